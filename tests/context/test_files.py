# SPDX-License-Identifier: Apache-2.0
"""Encoded contexts on disk: they come back as they were, and faults of the directory end writing alone."""

import errno
import os
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from frozen_peft.context.keys import prefix_keys
from frozen_peft.context.store.context_files import ContextFiles
from tests.context.stored import KEY, METADATA, OTHER_KEY, SPACE, content, path_of, same, warnings

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_an_entry_comes_back(
    files: ContextFiles, written: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    tensors, metadata = files.read(SPACE, KEY)
    assert same(tensors, written)
    assert metadata == METADATA
    again = ContextFiles(str(files.folder))
    assert same(again.read(SPACE, KEY)[0], written)
    assert files.usable
    assert not warnings(caplog)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_comes_back(files: ContextFiles, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (72,), dtype=torch.uint8)
    tensors = {"a": raw.view(dtype).reshape(3, -1)}
    assert files.write(SPACE, KEY, tensors, {})
    assert same(files.read(SPACE, KEY)[0], tensors)


def test_views_and_parameters_are_written_as_they_look(files: ContextFiles) -> None:
    buffer = torch.randn(2, 8, 4)
    tensors = {"room": buffer[:, :5], "turned": torch.randn(3, 4).t(), "weight": torch.nn.Parameter(torch.randn(2))}
    assert files.write(SPACE, KEY, tensors, {})
    assert same(files.read(SPACE, KEY)[0], {name: tensor.detach() for name, tensor in tensors.items()})


def test_nothing_is_an_entry_too(files: ContextFiles, caplog: pytest.LogCaptureFixture) -> None:
    assert files.write(SPACE, KEY, {}, {})
    assert files.read(SPACE, KEY) == ({}, {})
    assert not warnings(caplog)


def test_any_reader_of_safetensors_reads_an_entry(files: ContextFiles, written: dict[str, torch.Tensor]) -> None:
    assert same(safetensors.torch.load_file(path_of(files)), written)


def test_tensors_outlive_their_file(files: ContextFiles, written: dict[str, torch.Tensor]) -> None:
    tensors, _ = files.read(SPACE, KEY)
    os.truncate(path_of(files), 0)
    assert same(tensors, written)
    tensors["state.1"].zero_()


def test_namespaces_and_keys_are_apart(files: ContextFiles, written: dict[str, torch.Tensor]) -> None:
    other = {"a": torch.ones(3)}
    assert files.write("model-2", KEY, other, {})
    assert files.write(SPACE, OTHER_KEY, {"b": torch.ones(1)}, {})
    assert files.keys(SPACE) == {KEY, OTHER_KEY}
    assert files.keys("model-2") == {KEY}
    assert files.keys("model-3") == set()
    assert same(files.read(SPACE, KEY)[0], written)
    assert same(files.read("model-2", KEY)[0], other)
    assert files.read("model-2", OTHER_KEY) is None
    sizes = [path_of(files, SPACE, key).stat().st_size for key in (KEY, OTHER_KEY)]
    assert files.num_bytes(SPACE) == sum(sizes) > 0
    assert files.num_bytes("model-3") == 0


def test_writing_again_replaces(files: ContextFiles, written: dict[str, torch.Tensor]) -> None:
    newer = {"a": torch.ones(3)}
    assert files.write(SPACE, KEY, newer, {"n": "2"})
    tensors, metadata = files.read(SPACE, KEY)
    assert same(tensors, newer)
    assert metadata == {"n": "2"}
    assert [path.name for path in path_of(files).parent.iterdir()] == [path_of(files).name]


def test_removed_is_gone(
    files: ContextFiles, written: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        files.remove(SPACE, KEY)
        assert files.keys(SPACE) == set()
        assert files.read(SPACE, KEY) is None
    files.remove("nowhere", KEY)
    assert not warnings(caplog)


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o700])
def test_the_directory_says_who_may_read(files: ContextFiles, mode: int) -> None:
    path_of(files).parent.mkdir()
    path_of(files).parent.chmod(mode)
    assert files.write(SPACE, KEY, {"a": torch.ones(1)}, {})
    assert path_of(files).stat().st_mode & 0o777 == mode & 0o666


def test_a_file_that_vanishes_is_a_miss(
    files: ContextFiles, written: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    (key,) = files.keys(SPACE)
    path_of(files).unlink()
    assert files.read(SPACE, key) is None
    assert not warnings(caplog)


def test_unrelated_files_are_left_alone(files: ContextFiles, caplog: pytest.LogCaptureFixture) -> None:
    assert files.write(SPACE, OTHER_KEY, {}, {})
    name = path_of(files).name
    folder = path_of(files).parent
    names = {
        "README.md", "model.safetensors", "300-abc.safetensors", f"0{name}", name.upper(), f"{name}.bak",
        name.removesuffix(".safetensors"), "notes.tmp", "12.tmp",
    }  # fmt: skip
    for other in names:
        (folder / other).write_text("kept")
        os.utime(folder / other, (0, 0))
    again = ContextFiles(files.folder)
    assert again.keys(SPACE) == {OTHER_KEY}
    assert again.num_bytes(SPACE) == path_of(files, key=OTHER_KEY).stat().st_size
    assert {path.name for path in folder.iterdir() if path.read_bytes() == b"kept"} == names
    assert not warnings(caplog)


def test_a_file_that_cannot_be_removed_is_reported_once(
    files: ContextFiles,
    written: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path_of(files).write_bytes(b"")

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    for _ in range(2):
        assert files.read(SPACE, KEY) is None
        assert files.keys(SPACE) == set()
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{path_of(files)} is left alone and not used: it is no whole safetensors file")
    assert files.write(SPACE, KEY, written, METADATA)
    assert files.keys(SPACE) == {KEY}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_reported_and_left(
    files: ContextFiles,
    written: dict[str, torch.Tensor],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("frozen_peft.context.store.context_files._read_entry", failing)
        for _ in range(2):
            assert files.read(SPACE, KEY) is None
    (warning,) = warnings(caplog)
    assert os.strerror(number) in warning
    assert path_of(files).exists()


def test_temporary_directories_are_removed_when_old(files: ContextFiles, written: dict[str, torch.Tensor]) -> None:
    folder = path_of(files).parent
    ages = {"4711-abcd_123.tmp": 3700, "4712-abcd_123.tmp": 3500, "old.tmp": 10**6}
    for name, age in ages.items():
        (folder / name).mkdir()
        (folder / name / path_of(files).name).write_bytes(b"part")
        os.utime(folder / name, (time.time() - age,) * 2)
    again = ContextFiles(files.folder)
    assert {path.name for path in folder.glob("*.tmp")} == {"4712-abcd_123.tmp", "old.tmp"}
    assert again.keys(SPACE) == {KEY}


def stops_writing(files: ContextFiles, caplog: pytest.LogCaptureFixture) -> str:
    """Writes in vain, and returns the one warning about it."""
    caplog.clear()
    assert not files.write(SPACE, OTHER_KEY, content(), {})
    assert not files.usable
    assert not files.write(SPACE, OTHER_KEY, content(), {})
    (warning,) = warnings(caplog)
    assert warning.startswith(f"`context_cache_dir` cannot be written: {files.folder} (")
    return warning


@pytest.mark.parametrize(
    "step", ["frozen_peft.context.store.context_files._write_entry", "pathlib.Path.replace", "pathlib.Path.mkdir"]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_failure_to_write_ends_writing_and_not_reading(
    files: ContextFiles,
    written: dict[str, torch.Tensor],
    step: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts = []

    def failing(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(step, failing)
        assert os.strerror(number) in stops_writing(files, caplog)
    assert len(attempts) == 1
    assert not files.write(SPACE, OTHER_KEY, content(), {})
    assert files.keys(SPACE) == {KEY}
    assert same(files.read(SPACE, KEY)[0], written)
    assert [path.name for path in path_of(files).parent.iterdir()] == [path_of(files).name]


@pytest.mark.parametrize("below", ["", "contexts", "contexts/deeper"])
def test_a_folder_that_cannot_be_created_ends_writing(
    tmp_path: Path, below: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    files = ContextFiles(tmp_path / "file" / below)
    assert not files.usable
    (warning,) = warnings(caplog)
    assert str(tmp_path / "file" / below) in warning
    assert not files.write(SPACE, KEY, content(), {})
    assert files.read(SPACE, KEY) is None
    assert files.keys(SPACE) == set()
    assert files.num_bytes(SPACE) == 0
    files.remove(SPACE, KEY)
    assert len(warnings(caplog)) == 1


def test_a_file_in_a_namespaces_place_ends_writing(files: ContextFiles, caplog: pytest.LogCaptureFixture) -> None:
    (files.folder / SPACE).write_text("in the way")
    assert files.keys(SPACE) == set()
    assert files.read(SPACE, KEY) is None
    stops_writing(files, caplog)
    assert (files.folder / SPACE).read_text() == "in the way"


@pytest.mark.parametrize("namespace", ["", "..", ".", "a/b", "/a"])
def test_namespaces_are_plain_names(files: ContextFiles, namespace: str) -> None:
    with pytest.raises(AssertionError, match="plain file name"):
        files.read(namespace, KEY)


def test_keys_are_those_of_prefixes(files: ContextFiles) -> None:
    tokens = torch.arange(50)
    expected = set(prefix_keys(tokens, [1, 20, 50]).values())
    for key in expected:
        assert files.write(SPACE, key, {}, {})
    assert files.keys(SPACE) == expected
