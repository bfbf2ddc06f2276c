# SPDX-License-Identifier: Apache-2.0
"""Runs a module as several processes that are forks of one, which has imported the libraries once for all.

    python -m tests.distributed.forked MODULE NUM_PROCESSES TIMEOUT_SECONDS FOLDER [ARGUMENT...]

Each is what `python -m MODULE FOLDER ARGUMENT...` would be; its output goes to `FOLDER/rank-<rank>.log`, and how each
ended to `FOLDER/ended.json`, by rank: exit status and seconds, or null where it still ran when the time was over.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path


def start(module: str, arguments: list[str], rank: int, log: Path) -> int:
    """Begins the process of a rank; its process id."""
    process = os.fork()
    if process:
        return process
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(module: str, num_processes: int, timeout: float, folder: Path, *arguments: str) -> None:
    """Waits until all have ended, or the time is over."""
    importlib.import_module(module)
    began = time.monotonic()
    ended: dict[int, tuple[int, float] | None] = {}
    processes = [
        start(module, [str(folder), *arguments], rank, folder / f"rank-{rank}.log") for rank in range(num_processes)
    ]
    while len(ended) < num_processes and time.monotonic() - began < timeout:
        for rank, process in enumerate(processes):
            if rank not in ended:
                finished, status = os.waitpid(process, os.WNOHANG)
                if finished:
                    ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.05)
    running = [process for rank, process in enumerate(processes) if rank not in ended]
    for process in running:
        # They say where they wait.
        os.kill(process, signal.SIGUSR1)
    if running:
        time.sleep(1.0)
    for process in running:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    (folder / "ended.json").write_text(json.dumps([ended.get(rank) for rank in range(num_processes)]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:])
