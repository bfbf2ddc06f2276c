# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, against `SFTTrainer` and against the least that a frozen context costs.

Ratios within one run, of processor time on one thread, which other work on the machine moves least.
"""

from functools import cache
from typing import Any

import pytest

from tests.benchmarks.processes import measure_on_one_thread

pytestmark = [pytest.mark.slow, pytest.mark.benchmark, pytest.mark.timeout(900)]
CONTEXT = 8192


@cache
def measured(method: str, context: int, steps: int, **options: int) -> dict[str, Any]:
    return measure_on_one_thread("step", method=method, context=context, steps=steps, **options)


def test_step_takes_at_most_a_fifth_of_the_time_of_sft() -> None:
    frozen, sft = measured("frozen", CONTEXT, 3), measured("sft", CONTEXT, 1)
    assert frozen["cpu_seconds"] <= 0.20 * sft["cpu_seconds"], (frozen, sft)


def test_step_takes_at_most_an_eighth_of_the_memory_of_sft() -> None:
    """With chunks of 512: those of 2048, the default, are for large models, whose caches dwarf their activations."""
    frozen, sft = measured("frozen", CONTEXT, 1, chunk_size=512), measured("sft", CONTEXT, 1)
    assert frozen["peak_bytes"] <= 0.12 * sft["peak_bytes"], (frozen, sft)


@pytest.mark.long
def test_step_takes_little_more_than_the_bare_cost() -> None:
    frozen, bare = measured("frozen", CONTEXT, 3), measured("bare", CONTEXT, 3)
    assert frozen["cpu_seconds"] <= 1.15 * bare["cpu_seconds"], (frozen, bare)


@pytest.mark.long
def test_memory_grows_by_the_bytes_of_the_cache() -> None:
    short, long = measured("frozen", CONTEXT, 3), measured("frozen", 2 * CONTEXT, 1)
    growth = long["peak_bytes"] - short["peak_bytes"]
    assert growth <= 1.10 * (long["cache_bytes"] - short["cache_bytes"]), (short, long)
