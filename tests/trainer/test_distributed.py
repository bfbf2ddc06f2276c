# SPDX-License-Identifier: Apache-2.0
"""Two real processes (gloo) whose conversations have different numbers of turns."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.reference import reference_gradients, worst_gradient_error
from tests.trainer.runs import adapted
from tests.trainer.test_turns import ROWS, per_span

GRADIENT_TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(280)
def test_processes_with_different_numbers_of_turns(tmp_path: Path) -> None:
    """Neither waits for the other for ever, and both have the gradient of one process with both conversations."""
    assert [len(per_span([ROWS[index]])) for index in (0, 3)] == [4, 1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainer.turns_rank", str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    results = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    expected = reference_gradients(adapted("llama"), per_span([ROWS[0], ROWS[3]]))
    for result in results:
        assert worst_gradient_error(result["gradients"], expected) <= GRADIENT_TOLERANCE
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
