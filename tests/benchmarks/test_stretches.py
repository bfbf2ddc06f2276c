# SPDX-License-Identifier: Apache-2.0
"""What the full gradient in stretches costs, against `SFTTrainer` with gradient checkpointing.

Ratios within one run, of processor time on one thread, which other work on the machine moves least.
"""

from functools import cache
from typing import Any

import pytest

from tests.benchmarks import full_gradient

pytestmark = [pytest.mark.slow, pytest.mark.benchmark, pytest.mark.long, pytest.mark.timeout(3600)]
TOKENS = 8192


@cache
def measured(method: str, tokens: int, stretch: int = 1024) -> dict[str, Any]:
    figures = full_gradient.measure(method, tokens, steps=1, stretch=stretch)
    assert figures is not None
    return figures


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_step_takes_at_most_a_third_more_time_than_that_of_sft() -> None:
    stretches, sft = measured("stretches", TOKENS), measured("sft", TOKENS)
    assert stretches["cpu_seconds"] <= 1.35 * sft["cpu_seconds"], (stretches, sft)


def test_a_further_token_takes_at_most_two_and_a_half_times_its_cache() -> None:
    # Long stretches, since the states that each starts from are beside what a token costs.
    short, long = (measured("stretches", tokens, stretch=2048) for tokens in (TOKENS, 2 * TOKENS))
    cache_bytes = long["cache_bytes"] - short["cache_bytes"]
    assert long["peak_bytes"] - short["peak_bytes"] <= 2.5 * cache_bytes, (short, long)


def test_samples_are_eight_times_as_long_in_the_same_memory() -> None:
    """An address space that a sample of 4096 tokens does not fit into with `SFTTrainer`, and one of 8 x 4096 does."""
    tokens = 4096
    assert full_gradient.measure("sft", tokens, **full_gradient.FITTING) is None
    assert full_gradient.measure("stretches", 8 * tokens, **full_gradient.FITTING) is not None
