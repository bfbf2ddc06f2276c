# SPDX-License-Identifier: Apache-2.0
"""Runs a module as several real processes (gloo), which may take so long and not longer."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Ended:
    """How one process ended.

    Attributes:
        code: Exit status.
        seconds: From the start of all.
        output: What it wrote, standard error included.
    """

    code: int
    seconds: float
    output: str


def start_ranks(
    module: str, folder: Path, *arguments: str, num_processes: int = 2, timeout: float = 240.0
) -> list[Ended]:
    """Runs `python -m module folder arguments` once per rank; its output goes to `folder/rank-<rank>.log`.

    The module registers `faulthandler` for SIGUSR1.

    Raises:
        TimeoutError: One was still running after `timeout` seconds. All are ended then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-m", "tests.distributed.forked", module, str(num_processes), str(timeout), str(folder)]
    # A session of its own, whose processes are ended together where the test is.
    parent = subprocess.Popen([*command, *arguments], env=os.environ | shared, start_new_session=True)
    try:
        code = parent.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert code == 0, f"the process that starts the others ended with {code}"
    logs = [folder / f"rank-{rank}.log" for rank in range(num_processes)]
    ended = json.loads((folder / "ended.json").read_text())
    if running := [rank for rank, end in enumerate(ended) if end is None]:
        raise TimeoutError(f"Ranks {running} still run after {timeout} s.\n{_last_lines(logs)}")
    return [Ended(*end, log.read_text(errors="replace")) for end, log in zip(ended, logs, strict=True)]


def run_ranks(
    module: str, folder: Path, *arguments: str, num_processes: int = 2, timeout: float = 240.0
) -> list[dict[str, Any]]:
    """What each process left in `folder/rank-<rank>.pt`, once all have ended well."""
    ended = start_ranks(module, folder, *arguments, num_processes=num_processes, timeout=timeout)
    logs = [folder / f"rank-{rank}.log" for rank in range(num_processes)]
    assert [rank.code for rank in ended] == [0] * num_processes, _last_lines(logs)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(num_processes)]


def _last_lines(logs: Sequence[Path]) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
