# SPDX-License-Identifier: Apache-2.0
"""What a step over a preference pair costs, against `DPOTrainer` with gradient checkpointing.

Ratios within one run, of processor time on one thread, which other work on the machine moves least.
"""

from typing import Any

import pytest

from tests.benchmarks.processes import measure_on_one_thread

pytestmark = [pytest.mark.long, pytest.mark.benchmark, pytest.mark.timeout(1800)]
CONTEXT = 8192


def measured(method: str, steps: int, **options: Any) -> dict[str, Any]:
    return measure_on_one_thread("preference", method=method, context=CONTEXT, steps=steps, **options)


def test_a_step_takes_little_of_the_time_of_dpo() -> None:
    frozen, dpo = measured("frozen", 3), measured("dpo", 1)
    assert frozen["cpu_seconds"] <= 0.12 * dpo["cpu_seconds"], (frozen, dpo)


def test_a_step_takes_little_of_the_memory_of_dpo() -> None:
    frozen, dpo = measured("frozen", 3), measured("dpo", 1)
    assert frozen["peak_bytes"] <= 0.12 * dpo["peak_bytes"], (frozen, dpo)


def test_with_the_references_figures_beforehand() -> None:
    frozen, dpo = measured("frozen", 3, precompute=True), measured("dpo", 1, precompute=True)
    assert frozen["cpu_seconds"] <= 0.18 * dpo["cpu_seconds"], (frozen, dpo)


def test_from_the_second_epoch_on_contexts_of_the_base_cost_nothing() -> None:
    kept, dpo = measured("kept", 4), measured("dpo", 1)
    assert kept["cpu_seconds"] <= 0.03 * dpo["cpu_seconds"], (kept, dpo)
