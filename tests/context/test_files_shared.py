# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts on disk between processes, and on disks that are really full or read-only."""

import logging
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.context_files import ContextFiles

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SPACE = "model"
KEYS = [PrefixKey(n, f"{n:032x}") for n in range(1, 6)]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Starts processes from one that has imported all they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.context.test_files_shared"])
    return context


def started(context: ForkServerContext, target: Callable, *args: object) -> tuple[BaseProcess, Connection]:
    """A process that runs `target(*args, connection)`, and the other end: at its end too when the process dies."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, there))
    process.start()
    there.close()
    return process, here


def content(value: int, size: int = 20_000) -> dict[str, torch.Tensor]:
    """Tensors from which one can tell whether all of them belong together."""
    return {name: torch.full((size,), value, dtype=torch.bfloat16) for name in ("keys", "values")}


def is_whole(found: tuple[dict[str, torch.Tensor], dict[str, str]]) -> bool:
    tensors, metadata = found
    value = int(metadata["value"])
    expected = content(value)
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("frozen_peft").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def write_and_read(folder: Path, seed: int, seconds: float, answer: Connection) -> None:
    recorder, choice, files = Recorder(), random.Random(seed), ContextFiles(folder)
    counts = {"written": 0, "whole": 0, "wrong": 0, "missed": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = choice.randrange(256)
        counts["written"] += files.write(SPACE, choice.choice(KEYS), content(value), {"value": str(value)})
        if choice.random() < 0.1:
            files.remove(SPACE, choice.choice(KEYS))
        for key in files.keys(SPACE):
            found = files.read(SPACE, key)
            counts["missed" if found is None else "whole" if is_whole(found) else "wrong"] += 1
    answer.send((counts, recorder.messages, files.usable))


def test_processes_share_a_directory(tmp_path: Path, processes: ForkServerContext) -> None:
    workers = [started(processes, write_and_read, tmp_path, seed, 1.5) for seed in range(2)]
    answers = [here.recv() for _, here in workers]
    for worker, _ in workers:
        worker.join()
    for counts, messages, usable in answers:
        assert messages == []
        assert usable
        assert counts["wrong"] == 0
        assert counts["written"] > 10
        assert counts["whole"] > 10
    assert not list(tmp_path.glob("*/*.tmp"))


def write_for_ever(folder: Path, answer: Connection) -> None:
    files = ContextFiles(folder)
    value = 0
    while True:
        value = (value + 1) % 256
        assert files.write(SPACE, KEYS[value % len(KEYS)], content(value), {"value": str(value)})
        if value == 1:
            answer.send(True)


def test_writers_killed_at_any_moment_leave_whole_entries(
    tmp_path: Path, processes: ForkServerContext, caplog: pytest.LogCaptureFixture
) -> None:
    choice = random.Random(0)
    for _ in range(20):
        writer, here = started(processes, write_for_ever, tmp_path)
        assert here.recv()
        time.sleep(choice.uniform(0, 0.03))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        files = ContextFiles(tmp_path)
        keys = files.keys(SPACE)
        assert keys
        assert all(is_whole(files.read(SPACE, key)) for key in keys)
    # Otherwise no kill met a write, and nothing was tested.
    assert list(tmp_path.glob("*/*.tmp"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def write_beyond_limit(folder: Path, num_bytes: int, answer: Connection) -> None:
    recorder, files = Recorder(), ContextFiles(folder)
    first = files.write(SPACE, KEYS[0], content(1), {"value": "1"})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    later = [files.write(SPACE, key, content(2), {"value": "2"}) for key in KEYS]
    found = files.read(SPACE, KEYS[0])
    answer.send((first, later, found is not None and is_whole(found), recorder.messages))


def test_a_limit_that_cuts_a_file_off_ends_writing(tmp_path: Path, processes: ForkServerContext) -> None:
    writer, here = started(processes, write_beyond_limit, tmp_path, 30_000)
    first, later, still_read, messages = here.recv()
    writer.join()
    assert first
    assert later == [False] * len(KEYS)
    assert still_read
    (message,) = messages
    assert "File too large" in message
    assert [path.name for path in (tmp_path / SPACE).iterdir()] == [f"{KEYS[0]}.safetensors"]


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from tests.context.test_files_shared import KEYS, SPACE, ContextFiles, Recorder, content, is_whole

folder = Path(sys.argv[1])
whole = None
for state, reason in (("full", "No space left on device"), ("read-only", "Read-only file system")):
    recorder, files = Recorder(), ContextFiles(folder)
    if state == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    written = [files.write(SPACE, key, content(3), {"value": "3"}) for key in KEYS]
    before = whole
    whole = [key for key in KEYS if (found := files.read(SPACE, key)) is not None and is_whole(found)]
    assert not files.usable
    assert len(recorder.messages) == 1 and reason in recorder.messages[0], recorder.messages
    assert written == [state == "full" and key in whole for key in KEYS], written
    assert 0 < len(whole) < len(KEYS), "the disk holds all or nothing"
    assert state == "full" or whole == before, whole
    assert files.keys(SPACE) == set(whole)
    assert not list(folder.glob("*/*.tmp"))
print("as expected")
"""


def test_a_disk_that_is_full_or_read_only_ends_writing(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run([*own_mounts, *mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets no one mount a file system of his own")
    script = f'{" ".join(mount)} && exec "$@"'
    command = [*own_mounts, "sh", "-c", script, "sh", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "as expected", result.stderr
