# SPDX-License-Identifier: Apache-2.0
"""What is kept, and the reasons why the rest is not."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from frozen_peft.evaluation import Candidate, CandidateFilter, PromptRow

ROW = PromptRow(0, "p.jsonl, line 1", {"prompt": "Left?", "topic": "roads"}, "Left?", None, (5,))


def reason(keep: CandidateFilter, text: str = "ok, left", finish: str = "stop") -> str | None:
    (found,) = keep.judge([ROW], [Candidate(0, 0, 5, text, 3, finish)], {})
    return found


def test_without_a_filter_all_that_is_finished_is_kept() -> None:
    assert reason(CandidateFilter()) is None
    assert reason(CandidateFilter(), text=" \n") == "empty"
    assert reason(CandidateFilter(), finish="length") == "cut off at max_new_tokens"
    assert reason(CandidateFilter(keep_unfinished=True), finish="length") is None
    assert reason(CandidateFilter(keep_unfinished=True), finish="content_filter") == "ended by content_filter"


def test_a_regular_expression_matches_somewhere() -> None:
    keep = CandidateFilter(pattern=re.compile(r"\bok\b"))
    assert reason(keep, text="well, ok then") is None
    assert reason(keep, text="oklahoma") == "does not match keep_regex"


def test_a_function_sees_the_whole_sample() -> None:
    seen: list[dict[str, Any]] = []

    def short(sample: dict[str, Any]) -> bool:
        seen.append(sample)
        return len(sample["completion"]) < 10

    keep = CandidateFilter(function=short, function_name="f.py:short")
    assert reason(keep) is None
    assert reason(keep, text="rather the right road") == "refused by f.py:short"
    expected = {"prompt": "Left?", "topic": "roads", "completion": "ok, left", "candidate": 0, "seed": 5}
    assert seen[0] == expected


def test_a_function_that_fails_is_no_verdict() -> None:
    with pytest.raises(ValueError, match=r"p.jsonl, line 1, candidate 0: `f` failed: KeyError: 'missing'"):
        reason(CandidateFilter(function=lambda sample: sample["missing"], function_name="f"))
    with pytest.raises(ValueError, match=r"`f` returned 1, expected True or False"):
        reason(CandidateFilter(function=lambda sample: 1, function_name="f"))


class Lengths:
    """A margin that is easy to see: the length of the text."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def measure(self, rows: Sequence[PromptRow], candidates: Sequence[Candidate]) -> list[float]:
        assert len(rows) == len(candidates)
        self.measured += [candidate.text for candidate in candidates]
        return [float(len(candidate.text)) for candidate in candidates]


def test_a_margin_is_measured_of_what_is_left() -> None:
    lengths = Lengths()
    keep = CandidateFilter(pattern=re.compile("a"), margin=lengths, min_margin=3.0)
    candidates = [
        Candidate(0, number, 5, text, 1, "stop") for number, text in enumerate(["aaa", "bbbb", "aa", "abcd"])
    ]
    margins: dict[tuple[int, int], float] = {}
    expected = [None, "does not match keep_regex", "margin below 3", None]
    for _ in range(2):
        assert keep.judge([ROW] * 4, candidates, margins) == expected
        assert margins == {(0, 0): 3.0, (0, 2): 2.0, (0, 3): 4.0}
        # Those that are known are not measured again.
        assert lengths.measured == ["aaa", "aa", "abcd"]
