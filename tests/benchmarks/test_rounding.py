# SPDX-License-Identifier: Apache-2.0
"""The measurement of rounding can tell rounding from a lost context, and its page shows what it found."""

from pathlib import Path

import pytest

from tests.benchmarks import rounding
from tests.benchmarks.rounding_page import make_page


def test_what_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with windows and one with recurrent states; trainings are made up."""
    monkeypatch.setitem(rounding.NUM_SAMPLES, "random", 1)
    figures = [rounding.model_errors(name, tmp_path) for name in ("qwen3_5_text", "gemma3_text")]
    for figure in figures:
        found = figure["errors"]
        assert 0 < 100 * found["int8"]["mean"] < found["keys and values lost"]["mean"]
        assert 0 < 100 * found["int8"]["gradient"] < found["keys and values lost"]["gradient"]
        assert found["int8"]["mean"] <= found["int8"]["largest"]
    hybrid, sliding = (figure["errors"] for figure in figures)
    assert hybrid["recurrent in bfloat16"]["mean"] < hybrid["recurrent in 8 bit"]["mean"]
    assert sliding["recurrent in 8 bit"]["mean"] == 0 < sliding["windows too, symmetric"]["mean"]
    run = {"dtype": "int8", "seed": 0, "steps": 2, "held_out_samples": 3, "before": 1.0, "train_losses": [0.5, 0.25]}
    page = make_page(figures, [{**run, "held_out": {"kept": 0.75, "exact": 0.625}}])
    rows = {line.split("|")[1].strip(): line for line in page.text.splitlines() if line.startswith("| ")}
    assert "| 0    | int8                | 1.00000 |      0.62500 |        0.75000 |            0.37500 |" in page.text
    assert f"{sliding['int8']['cosine_below_1']:.1e}" in rows["gemma3_text"]
    assert [cell.strip() for cell in rows["gemma3_text"].split("|")].count("") == 5
