# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed at random moments end like one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "num_kills",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(6, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(30, marks=[pytest.mark.slow, pytest.mark.benchmark, pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_killed_runs_end_with_the_weights_of_one_that_was_not(num_kills: int, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cli.killed_runs", str(tmp_path), str(num_kills), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stderr + (log.read_text(encoding="utf-8")[-4000:] if log.exists() else "")
    print(done.stdout)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == num_kills
    # Two kills may both come before the first checkpoint.
    assert num_kills == 2 or any(name.startswith("checkpoint-") for name in report["from"])
