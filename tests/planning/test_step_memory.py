# SPDX-License-Identifier: Apache-2.0
"""Plans against the peaks that were measured, and the formulas' constants against what they are of."""

import json
from pathlib import Path
from typing import Any

import pytest
import trl.trainer.utils
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from frozen_peft.planning.step_memory import HEAD_COLUMNS, HEAD_ROWS
from tests.benchmarks.plan_page import plan_of, plan_page, planned_bytes

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
MEASURED = json.loads((RESULTS / "plan.json").read_text())["figures"]


@pytest.mark.parametrize(
    "figures", MEASURED, ids=lambda one: f"{one['model']}-{one['tier']}-{one.get('kind', '')}-{one['context']}"
)
def test_a_plan_is_within_15_percent_of_the_measured_peak(figures: dict[str, Any]) -> None:
    plan = plan_of(figures["model"], figures["tier"], figures["context"], figures.get("kind"))
    assert not plan.unknown
    assert planned_bytes(plan) == pytest.approx(figures["peak_bytes"], rel=0.15)


def test_the_page_says_what_the_planner_says() -> None:
    assert (RESULTS / "plan.md").read_text().startswith(plan_page(MEASURED).text)


def test_tiles_of_logits_are_those_of_trl() -> None:
    assert (HEAD_COLUMNS, HEAD_ROWS) == (trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, TOKEN_CHUNK_SIZE)
