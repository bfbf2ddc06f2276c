# SPDX-License-Identifier: Apache-2.0
"""Runs measurements, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def measure(module: str, environment: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Runs `python -m tests.benchmarks.MODULE --option value ...` and reads the figures that it prints last.

    An option that is True is given without a value.

    Raises:
        RuntimeError: The measurement failed.
    """
    command = [sys.executable, "-m", f"tests.benchmarks.{module}"]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@cache
def measure_on_one_thread(module: str, **options: Any) -> dict[str, Any]:
    """What `measure` gives on one thread, once for all tests that ask for it."""
    return measure(module, {"OMP_NUM_THREADS": "1"}, **options)
