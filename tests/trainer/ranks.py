# SPDX-License-Identifier: Apache-2.0
"""Runs a module as two real processes (gloo)."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_ranks(module: str, folder: Path) -> list[dict[str, Any]]:
    """What each process left in `folder/rank-<rank>.pt`, once both have ended well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, str(folder)]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]
