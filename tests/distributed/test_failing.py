# SPDX-License-Identifier: Apache-2.0
"""A process that fails stops the others, with an error that shows, within the time-out."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300)]


def test_under_the_launcher_all_stop_with_its_error(tmp_path: Path) -> None:
    """As under `accelerate launch`, which starts processes by `torchrun`; nobody waits for the time-out of an hour."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.failing_rank", str(tmp_path), "raises", "3600"]
    start = time.monotonic()
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240.0, check=False
    )
    assert ended.returncode != 0
    assert "ValueError: a sample that nobody can train on" in ended.stderr
    assert "exitcode  : 1" in ended.stderr
    assert "'loss'" in ended.stdout
    assert time.monotonic() - start < 240.0


@pytest.mark.long
def test_alone_the_others_stop_once_they_have_waited_long_enough(tmp_path: Path) -> None:
    """Without a launcher that watches: rank 1 stays where it is, and rank 0 gives up after 20 seconds."""
    with pytest.raises(TimeoutError) as error:
        start_ranks("tests.distributed.failing_rank", tmp_path, "sleeps", "20", timeout=150.0)
    # Rank 0 ended by itself; its error says that it has waited for rank 1.
    assert "Ranks [1] still run" in str(error.value)
    assert "Timed out waiting 20000ms" in (tmp_path / "rank-0.log").read_text()
