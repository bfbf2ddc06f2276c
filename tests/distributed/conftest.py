# SPDX-License-Identifier: Apache-2.0
"""Launches processes once for all tests, also where several workers of pytest-xdist share the tests."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.distributed.ranks import run_ranks

# A launch takes up to 90 seconds on two free cores; the rest is for busy ones.
TIMEOUT_SECONDS = 480.0
Results = list[dict[str, Any]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Gives what each rank of so many processes computed, by case."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    @cache
    def launched(num_processes: int) -> Results:
        folder = Path(root) / f"ranks-{num_processes}"
        failure = folder.with_suffix(".failure")
        with FileLock(folder.with_suffix(".lock")):
            if failure.exists():
                pytest.fail(f"The processes did not end well, see the first of these tests.\n{failure.read_text()}")
            if not folder.exists():
                failure.write_text("They were still running.")
                try:
                    run_ranks(
                        "tests.distributed.parity_rank", folder, num_processes=num_processes, timeout=TIMEOUT_SECONDS
                    )
                except BaseException as error:
                    failure.write_text(str(error))
                    raise
                failure.unlink()
        return [torch.load(folder / f"rank-{rank}.pt") for rank in range(num_processes)]

    return launched
