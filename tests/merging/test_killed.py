# SPDX-License-Identifier: Apache-2.0
"""Merges that are killed at any moment: what is there is whole, and the next run gives the same."""

import hashlib
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from frozen_peft import merge_adapter
from tests.merging.cases import Case, lora, save_case


def digest(folder: Path) -> dict[str, str]:
    """Every file's content; the report is the run's own, and the same for equal arguments."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def merge(adapter: Path, output: Path, base: Path) -> None:
    merge_adapter(adapter, output, base, verify=False)


@pytest.mark.parametrize(
    "num_kills",
    [
        pytest.param(6, marks=pytest.mark.slow),
        pytest.param(30, marks=[pytest.mark.slow, pytest.mark.benchmark, pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_kills_at_random_moments(num_kills: int, tmp_path: Path) -> None:
    # Large enough that most of the time goes into writing.
    fields = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}
    base, adapter = save_case(Case("llama", lora(), fields), tmp_path, max_shard_size="25MB")
    output, expected = tmp_path / "merged", tmp_path / "expected"
    merge(adapter, expected, base)
    whole = digest(expected)
    # Children of a server that has imported everything: a kill then hits the merge, not an import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["frozen_peft.merging.merging", "tests.merging.test_killed"])
    generator = random.Random(0)
    # The first child starts the server.
    for number in range(2):
        start = time.monotonic()
        child = context.Process(target=merge, args=(adapter, tmp_path / f"timed{number}", base))
        child.start()
        child.join()
        seconds = time.monotonic() - start
    num_killed = num_unfinished = 0
    while num_killed < num_kills:
        child = context.Process(target=merge, args=(adapter, output, base))
        child.start()
        time.sleep(generator.uniform(0.1 * seconds, seconds))
        child.kill()
        child.join()
        num_killed += child.exitcode == -signal.SIGKILL
        left = tmp_path / ".merged.unfinished"
        num_unfinished += left.exists()
        if output.exists():
            assert digest(output) == whole
        else:
            merge(adapter, output, base)
            assert digest(output) == whole
        assert not left.exists()
        for path in sorted(output.rglob("*"), reverse=True):
            path.unlink()
        output.rmdir()
    print(f"a merge takes {seconds:.2f} s; {num_killed} kills, {num_unfinished} while the output was being written")
    assert num_unfinished >= num_kills // 6


def test_a_half_written_folder_is_cleared_and_has_no_name_of_its_own(tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    left = tmp_path / ".merged.unfinished"
    (left / "deep").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "deep" / "file").write_bytes(b"half")
    merge(adapter, tmp_path / "merged", base)
    merge(adapter, tmp_path / "expected", base)
    assert not left.exists()
    assert digest(tmp_path / "merged") == digest(tmp_path / "expected")


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    with (
        FileLock(tmp_path / ".merged.unfinished.lock"),
        pytest.raises(FileExistsError, match="Another process is writing"),
    ):
        merge(adapter, tmp_path / "merged", base)
    merge(adapter, tmp_path / "merged", base)
    assert (tmp_path / "merged" / "config.json").is_file()
    assert not list(tmp_path.glob(".merged*"))
