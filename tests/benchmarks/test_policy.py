# SPDX-License-Identifier: Apache-2.0
"""What a step over a model's own answers costs, against `trl.experimental.sdft` with its prompt not truncated.

Ratios within one run, of processor time on one thread, which other work on the machine moves least.
"""

from typing import Any

import pytest

from tests.benchmarks.policy_page import ANSWER, CONTEXT
from tests.benchmarks.processes import measure_on_one_thread

pytestmark = [pytest.mark.long, pytest.mark.benchmark, pytest.mark.timeout(3600)]


def measured(method: str, steps: int) -> dict[str, Any]:
    return measure_on_one_thread("policy", method=method, context=CONTEXT, answer=ANSWER, steps=steps)


def test_a_step_takes_little_of_the_time_of_sdft() -> None:
    kept, frozen, sdft = measured("kept", 4), measured("frozen", 3), measured("sdft", 1)
    assert kept["cpu_seconds"] <= 0.10 * sdft["cpu_seconds"], (kept, sdft)
    assert frozen["cpu_seconds"] <= 0.10 * sdft["cpu_seconds"], (frozen, sdft)
    for own in (kept, frozen):
        # One prefill of the student's context in each step.
        assert {log["context/tokens_encoded"] for log in own["logs"]} == {CONTEXT - 1.0}
