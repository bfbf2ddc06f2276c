# SPDX-License-Identifier: Apache-2.0
"""Numbers read as they should, and no character hides."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.report.formats import seconds_text, visible


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 ms"),
        (0.0123, "12.3 ms"),
        (0.0996, "0.10 s"),
        (9.99, "9.99 s"),
        (9.996, "10.0 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (3599.7, "60 min 0 s"),
        (7200, "2 h 0 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@given(st.text(st.characters(codec=None), max_size=30))
def test_what_is_not_seen_is_written_out(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    # Controls, half surrogate pairs and what has a direction; formats that join letters are hidden too.
    hidden = [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert hidden == []
    assert not any(
        unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI") for c in shown
    )


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=30))
def test_what_is_seen_stays(text: str) -> None:
    assert visible(text) == text
