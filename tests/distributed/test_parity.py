# SPDX-License-Identifier: Apache-2.0
"""Several real processes (gloo) compute what one process computes, with whole weights and with weights in shards."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.distributed.cases import Case, Reference, cases, ragged_cases, reference
from tests.distributed.conftest import TIMEOUT_SECONDS, Results
from tests.distributed.ranks import run_ranks
from tests.reference import worst_gradient_error
from tests.training.runs import UPDATE_TOLERANCE, trained_weights, worst_update_error

# The trainer adds losses up in float32.
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-10
NUM_RAGGED_BATCHES = 200

KEYS = [
    pytest.param(num_processes, f"{engine}/{name}", id=f"{num_processes}-{engine}-{name}")
    for num_processes in (2, 3)
    for name, case in cases(num_processes).items()
    for engine in case.engines
]

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@cache
def expected(num_processes: int, name: str) -> Reference:
    return reference(cases(num_processes)[name], num_processes)


def check(results: Results, key: str, case: Case, plain: Reference) -> tuple[float, float]:
    """Holds every rank to one process: losses, the gradients of the first step, the weights after the last.

    Returns:
        The worst relative error of a loss, and that of a gradient.
    """
    start = trained_weights(case.make_model())
    of_losses, of_gradients = [], []
    for rank in results:
        result = rank[key]
        assert "error" not in result, result["error"]
        assert result["shards"] == key.startswith("fsdp2/")
        assert result["losses"] == pytest.approx(plain.losses, rel=LOSS_TOLERANCE)
        assert result["eval_loss"] == pytest.approx(plain.eval_loss, rel=LOSS_TOLERANCE)
        assert worst_gradient_error(result["gradients"], plain.gradients) <= GRADIENT_TOLERANCE
        assert worst_update_error(result["weights"], plain.weights, start) <= UPDATE_TOLERANCE
        of_losses += [abs(a - b) / abs(b) for a, b in zip(result["losses"], plain.losses, strict=True)]
        of_gradients.append(worst_gradient_error(result["gradients"], plain.gradients))
    return max(of_losses), max(of_gradients)


@pytest.mark.timeout(TIMEOUT_SECONDS + 120)
@pytest.mark.parametrize(("num_processes", "key"), KEYS)
def test_processes_compute_what_one_does(num_processes: int, key: str, results: Callable[[int], Results]) -> None:
    name = key.partition("/")[2]
    check(results(num_processes), key, cases(num_processes)[name], expected(num_processes, name))


@pytest.mark.long
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("num_processes", [2, 3])
def test_everything_with_each_engine(num_processes: int, tmp_path: Path) -> None:
    results = run_ranks("tests.distributed.parity_rank", tmp_path, "all", num_processes=num_processes, timeout=1200.0)
    for name, case in cases(num_processes, all_engines=True).items():
        for engine in case.engines:
            check(results, f"{engine}/{name}", case, reference(case, num_processes))


@pytest.mark.long
@pytest.mark.timeout(1300)
def test_200_random_ragged_batches_on_three_processes(tmp_path: Path) -> None:
    """None waits for another for ever, and every loss is that of one process."""
    results = run_ranks("tests.distributed.parity_rank", tmp_path, "ragged", num_processes=3, timeout=1200.0)
    all_cases = ragged_cases(3, NUM_RAGGED_BATCHES)
    assert sum(case.steps for case in all_cases.values()) == NUM_RAGGED_BATCHES
    for name, case in all_cases.items():
        errors = check(results, f"fsdp2/{name}", case, reference(case, 3))
        print(f"{name}: {case.steps} batches, losses within {errors[0]:.1e}, gradients within {errors[1]:.1e}")
