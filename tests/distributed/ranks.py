# SPDX-License-Identifier: Apache-2.0
"""Runs a module as several real processes (gloo), which may take so long and not longer."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
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
    logs = [folder / f"rank-{rank}.log" for rank in range(num_processes)]
    start = time.monotonic()
    processes = []
    seconds: dict[int, float] = {}
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, str(folder), *arguments],
                        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        while len(seconds) < num_processes:
            for rank, process in enumerate(processes):
                if rank not in seconds and process.poll() is not None:
                    seconds[rank] = time.monotonic() - start
            if time.monotonic() - start > timeout:
                running = sorted(set(range(num_processes)) - set(seconds))
                for rank in running:
                    # They say where they wait.
                    processes[rank].send_signal(signal.SIGUSR1)
                time.sleep(1.0)
                raise TimeoutError(f"Ranks {running} still run after {timeout} s.\n{_last_lines(logs)}")
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    return [
        Ended(process.returncode, seconds[rank], logs[rank].read_text(errors="replace"))
        for rank, process in enumerate(processes)
    ]


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
