# SPDX-License-Identifier: Apache-2.0
"""Launches processes once for all tests, also where several workers of pytest-xdist share the tests."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.made_once import made_once

# A launch takes up to 90 seconds on two free cores; the rest is for busy ones.
TIMEOUT_SECONDS = 480.0
Results = list[dict[str, Any]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Gives what each rank of so many processes computed, by case."""

    @cache
    def launched(num_processes: int) -> Results:
        folder = made_once(
            tmp_path_factory,
            f"ranks-{num_processes}",
            lambda folder: run_ranks(
                "tests.distributed.parity_rank", folder, num_processes=num_processes, timeout=TIMEOUT_SECONDS
            ),
        )
        return [torch.load(folder / f"rank-{rank}.pt") for rank in range(num_processes)]

    return launched
