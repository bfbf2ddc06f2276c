# SPDX-License-Identifier: Apache-2.0
"""Several real processes (gloo) compute what one process computes, with whole weights and with weights in shards."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import Reference, cases, reference
from tests.distributed.ranks import run_ranks
from tests.reference import worst_gradient_error
from tests.trainer.runs import trained_weights, worst_update_error

TOLERANCE = 1e-5
# What is left of float32 weights after subtracting what they were.
UPDATE_TOLERANCE = 3e-5
# Processes start in ten seconds; each case takes about one.
TIMEOUT_SECONDS = 240.0

KEYS = [
    pytest.param(num_processes, f"{engine}/{name}", id=f"{num_processes}-{engine}-{name}")
    for num_processes in (2, 3)
    for name, case in cases(num_processes).items()
    for engine in case.engines
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(TIMEOUT_SECONDS + 30),
    # One launch of processes for all cases of their number.
    pytest.mark.xdist_group("ranks"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives what each rank of a number of processes computed, by case."""

    @cache
    def launched(num_processes: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"ranks-{num_processes}")
        return run_ranks(
            "tests.distributed.parity_rank", Path(folder), num_processes=num_processes, timeout=TIMEOUT_SECONDS
        )

    return launched


@cache
def expected(num_processes: int, name: str) -> Reference:
    return reference(cases(num_processes)[name], num_processes)


@pytest.mark.parametrize(("num_processes", "key"), KEYS)
def test_processes_compute_what_one_does(num_processes: int, key: str, results: Any) -> None:
    """The loss of every step, the gradients of the first, and the weights after the last."""
    engine, _, name = key.partition("/")
    case = cases(num_processes)[name]
    plain = expected(num_processes, name)
    start = trained_weights(case.make_model())
    for rank in results(num_processes):
        result = rank[key]
        assert "error" not in result, result["error"]
        assert result["shards"] == (engine == "fsdp2")
        assert result["losses"] == pytest.approx(plain.losses, rel=TOLERANCE)
        assert result["eval_loss"] == pytest.approx(plain.eval_loss, rel=TOLERANCE)
        assert worst_gradient_error(result["gradients"], plain.gradients) <= TOLERANCE
        assert worst_update_error(result["weights"], plain.weights, start) <= UPDATE_TOLERANCE
