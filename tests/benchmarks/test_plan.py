# SPDX-License-Identifier: Apache-2.0
"""What the planner says of memory, against the peak that training in a process of its own reaches on a CPU."""

from typing import Any

import pytest

from tests.benchmarks.plan_page import HEAD_TILES, plan_of, planned_bytes
from tests.benchmarks.plan_step import KINDS, MODELS
from tests.benchmarks.processes import measure_on_one_thread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def assert_planned(model: str, **options: Any) -> None:
    """Measures, and holds the plan of every measurement to 15 %."""
    tile = {"head-tile": HEAD_TILES[model]} if HEAD_TILES[model] else {}
    figures = measure_on_one_thread("plan_step", model=model, **tile, **options)
    assert figures
    for one in figures:
        planned = planned_bytes(plan_of(model, one["tier"], one["context"], one.get("kind")))
        assert abs(planned - one["peak_bytes"]) <= 0.15 * one["peak_bytes"], (one, planned)


def test_a_frozen_context_of_a_hybrid_takes_what_its_plan_says() -> None:
    assert_planned("hybrid", tier=2, context=1024)


@pytest.mark.long  # every cell of what was measured before is held without measuring, in `tests/planning`
@pytest.mark.parametrize("kind", KINDS)
def test_turns_and_a_teacher_of_a_hybrid_take_what_their_plan_says(kind: str) -> None:
    assert_planned("hybrid", kind=kind, context=1024)


@pytest.mark.long
@pytest.mark.benchmark
@pytest.mark.parametrize("model", MODELS)
def test_every_tier_takes_what_its_plan_says(model: str) -> None:
    assert_planned(model)
    for kind in KINDS:
        assert_planned(model, kind=kind)
