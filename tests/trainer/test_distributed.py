# SPDX-License-Identifier: Apache-2.0
"""Two real processes (gloo) whose conversations have different numbers of turns."""

from pathlib import Path

import pytest

from tests.reference import reference_gradients, worst_gradient_error
from tests.trainer.ranks import run_ranks
from tests.trainer.runs import adapted
from tests.trainer.test_turns import ROWS, per_span

GRADIENT_TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_processes_with_different_numbers_of_turns(tmp_path: Path) -> None:
    """Neither waits for the other for ever, and both have the gradient of one process with both conversations."""
    assert [len(per_span([ROWS[index]])) for index in (0, 3)] == [4, 1]
    results = run_ranks("tests.trainer.turns_rank", tmp_path)
    expected = reference_gradients(adapted("llama"), per_span([ROWS[0], ROWS[3]]))
    for result in results:
        assert worst_gradient_error(result["gradients"], expected) <= GRADIENT_TOLERANCE
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
