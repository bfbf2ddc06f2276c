# SPDX-License-Identifier: Apache-2.0
"""What contexts that come again cost, against `SFTTrainer` and against one sample per decision.

Ratios within one run, of processor time on one thread, which other work on the machine moves least. `SFTTrainer`
shares nothing, so its time per sample is taken from a single one, after a short run that loads what there is to load.
"""

from functools import cache
from typing import Any

import pytest

from tests.benchmarks.processes import measure_on_one_thread

pytestmark = [pytest.mark.slow, pytest.mark.benchmark, pytest.mark.timeout(900)]
LONG_CONTEXT = 32768


def measured(scenario: str, method: str, **sizes: int) -> dict[str, Any]:
    return measure_on_one_thread("reuse", scenario=scenario, method=method, **sizes)


@cache
def sft_on_4k() -> dict[str, Any]:
    return measured("epochs", "sft", repeats=1)


@pytest.mark.long
def test_conversation_is_four_times_as_fast_as_sft() -> None:
    turns, sft = measured("conversation", "turns", repeats=2), measured("conversation", "sft", repeats=1)
    assert 4 * turns["cpu_seconds"] <= sft["cpu_seconds"], (turns, sft)


@pytest.mark.long
def test_conversation_is_five_times_as_fast_as_one_sample_per_span() -> None:
    turns, naive = measured("conversation", "turns", repeats=2), measured("conversation", "naive", repeats=2)
    assert naive["tokens_reused"] == 0
    assert 5 * turns["cpu_seconds"] <= naive["cpu_seconds"], (turns, naive)


def test_shared_document_is_ten_times_as_fast_as_sft() -> None:
    shared, sft = measured("document", "shared", repeats=2), sft_on_4k()
    assert shared["context"] == sft["context"]
    assert 10 * shared["cpu_seconds"] <= sft["cpu_seconds"], (shared, sft)


def test_later_epochs_are_fifteen_times_as_fast_as_sft() -> None:
    store, sft = measured("epochs", "store", repeats=2), sft_on_4k()
    assert store["hit_rate"] == 1.0
    assert 15 * store["cpu_seconds"] <= sft["cpu_seconds"], (store, sft)


@pytest.mark.long
def test_long_context_takes_little_more_memory_than_its_cache() -> None:
    long, empty = (
        measure_on_one_thread("step", method="frozen", context=context, steps=1) for context in (LONG_CONTEXT, 0)
    )
    assert long["peak_bytes"] <= 1.3 * long["cache_bytes"] + empty["peak_bytes"], (long, empty)
