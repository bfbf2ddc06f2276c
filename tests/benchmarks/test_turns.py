# SPDX-License-Identifier: Apache-2.0
"""What turns behind what inference shows cost, against one sample per turn.

Ratios within one run, of processor time on one thread, which other work on the machine moves least.
"""

from typing import Any

import pytest

from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.turns_page import make_page

pytestmark = [pytest.mark.slow, pytest.mark.benchmark, pytest.mark.timeout(1800)]


def measured(trace: str, method: str, **sizes: int) -> dict[str, Any]:
    return measure_on_one_thread("turns", trace=trace, method=method, **sizes)


@pytest.mark.long
@pytest.mark.parametrize("trace", ["loop", "chat"])
def test_sixteen_turns_are_four_times_as_fast_as_one_sample_per_turn(trace: str) -> None:
    branches, naive = measured(trace, "branches", repeats=2), measured(trace, "naive", repeats=2)
    assert branches["turns"] == naive["turns"] == 16
    assert branches["longest"] == pytest.approx(8192, rel=0.05)
    assert 4 * branches["cpu_seconds"] <= naive["cpu_seconds"], (branches, naive)


@pytest.mark.long
def test_fifty_calls_and_16k_tokens_train_in_one_pass() -> None:
    long = measured("long", "branches", repeats=1)
    assert len(long["steps"]) == 1
    assert long["longest"] == pytest.approx(16384, rel=0.05)
    assert long["tokens_encoded"] <= 1.15 * (long["longest"] + long["branches"]), long


@pytest.mark.parametrize("trace", ["loop", "chat", "questions"])
def test_what_is_encoded_is_what_is_visible(trace: str) -> None:
    found = measured(trace, "branches", repeats=1, tokens=1024)
    assert found["tokens_encoded"] <= 1.15 * (found["longest"] + found["branches"]), found
    naive = {**found, "method": "naive"}
    assert f"| {trace}" in make_page([found, naive]).text
