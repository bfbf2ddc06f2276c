# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign files in the place of an entry: reported, removed and missing, never read as one."""

import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frozen_peft.context import ContextFiles, DiskLevel
from frozen_peft.context.keys import PrefixKey
from frozen_peft.context.store.memory_level import Entry
from tests.context.stored import KEY, METADATA, OTHER_KEY, SPACE, content, path_of, same, warnings

# What version 1 wrote, before there was another, byte for byte.
OLD_HEADER = {
    "__metadata__": {
        "format": "frozen_peft.context",
        "version": "1",
        "entry": "model-1/300-0123456789abcdef0123456789abcdef",
        "metadata": '{"prefix": "[17, \\"ffffffffffffffffffffffffffffffff\\"]", "windows": "[8, null]"}',
        "checksum": "7620a18437c807e9ea3c75a5061f4c1a",
    },
    "1.recurrent.0": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
    "0.keys": {"dtype": "BF16", "shape": [1, 1, 1, 2], "data_offsets": [8, 12]},
}
OLD_DATA = b"\x00\x00\x00?o\x12\x83:\x80?\x00\xc0"
OLD_TENSORS = {
    "0.keys": torch.tensor([[[[1.0, -2.0]]]], dtype=torch.bfloat16),
    "1.recurrent.0": torch.tensor([[0.5, 1e-3]]),
}


def test_files_of_earlier_releases_are_read(files: ContextFiles) -> None:
    path_of(files).parent.mkdir()
    path_of(files).write_bytes(with_header(OLD_HEADER, OLD_DATA))
    entry = DiskLevel(files).read((SPACE, KEY))
    assert entry is not None
    assert (entry.prefix, entry.windows) == (OTHER_KEY, (8, None))
    assert same(entry.tensors, OLD_TENSORS)


def test_files_are_what_earlier_releases_read(files: ContextFiles) -> None:
    disk = DiskLevel(files)
    disk.write((SPACE, KEY), Entry(OTHER_KEY, (8, None), OLD_TENSORS))
    disk.flush()
    written = path_of(files).read_bytes()
    length = int.from_bytes(written[:8], "little")
    assert json.loads(written[8 : 8 + length]) == OLD_HEADER
    assert written[8 + length :] == OLD_DATA


def rejects(files: ContextFiles, data: bytes, caplog: pytest.LogCaptureFixture) -> str:
    """Puts data where an entry would be, and returns the one warning about it."""
    path = path_of(files)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    caplog.clear()
    assert files.read(SPACE, KEY) is None
    assert not path.exists()
    assert files.read(SPACE, KEY) is None
    assert files.keys(SPACE) == set()
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{path} is removed, because ")
    assert files.usable
    return warning


def test_every_flipped_byte_is_found(
    files: ContextFiles, written: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    whole = path_of(files).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    # The header is padded with spaces, which mean nothing.
    meaningful = len(whole[:header_end].rstrip(b" "))
    for index in [*range(meaningful), *range(header_end, len(whole))]:
        for flipped in (1, 0x80):
            rejects(files, whole[:index] + bytes([whole[index] ^ flipped]) + whole[index + 1 :], caplog)


def test_every_truncation_is_found(
    files: ContextFiles, written: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    whole = path_of(files).read_bytes()
    for length in range(len(whole)):
        rejects(files, whole[:length], caplog)
    # As a power failure leaves it: the length is there, and the data is not.
    for length in range(8, len(whole) - 1, 7):
        rejects(files, whole[:length] + bytes(len(whole) - length), caplog)
    rejects(files, whole + b"\0", caplog)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_nothing_wrong_is_read(
    files: ContextFiles, written: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    path = path_of(files)
    if not path.exists():
        assert files.write(SPACE, KEY, written, METADATA)
    whole = path.read_bytes()
    changed = bytearray(whole)
    for index, byte in data.draw(st.dictionaries(st.integers(0, len(whole) - 1), st.integers(0, 255))).items():
        changed[index] = byte
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    changed[begin:end] = data.draw(st.binary(max_size=40) | st.just(bytes(changed[begin:end])))
    path.write_bytes(changed)
    found = files.read(SPACE, KEY)
    assert (found is None) != path.exists()
    if found is not None:
        assert same(found[0], written)
        assert found[1] == METADATA


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def our_header(**tensors: object) -> dict[str, object]:
    entry = f"{SPACE}/{KEY}"
    stamp = {"format": "frozen_peft.context", "version": "1", "entry": entry, "metadata": "{}", "checksum": "0" * 32}
    return {"__metadata__": stamp, **tensors}


def one_tensor(shape: list, offsets: list[int], dtype: str = "U8") -> bytes:
    """An entry with one byte of data, and whatever a header may say of it."""
    return with_header(our_header(a={"dtype": dtype, "shape": shape, "data_offsets": offsets}), b"x")


FOREIGN = {
    "pickle": (pickle.dumps({"a": 1}), "no whole safetensors file"),
    "text": (b"What is this file for? Nobody knows.", "no whole safetensors file"),
    "huge header": (struct.pack("<Q", 2**63) + bytes(100), "no whole safetensors file"),
    "other safetensors": (safetensors.torch.save({"a": torch.ones(2)}), "no encoded context"),
    "other metadata": (safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}), "no encoded context"),
    "list": (with_header([1, 2]), "no whole safetensors file"),
    "text as metadata": (with_header({"__metadata__": "text"}), "no whole safetensors file"),
    "number": (with_header(5), "no whole safetensors file"),
    "no metadata": (with_header({"__metadata__": None}), "no encoded context"),
    "nested": (struct.pack("<Q", 100_000) + b"[" * 100_000, "no whole safetensors file"),
    "no object": (with_header(our_header(a=[1])), "no whole safetensors file"),
    "no type": (with_header(our_header(a={"shape": [], "data_offsets": [0, 0]})), "no whole safetensors file"),
    "unknown type": (one_tensor([], [0, 0], dtype="F3"), "no whole safetensors file"),
    "fraction": (one_tensor([0.0], [0, 0]), "no whole safetensors file"),
    "negative": (one_tensor([-1, -1], [0, 1]), "no whole safetensors file"),
    "before": (one_tensor([1], [-1, 0]), "no whole safetensors file"),
    "three ends": (one_tensor([1], [0, 1, 1]), "no whole safetensors file"),
    "vast": (one_tensor([2**40], [0, 2**40]), "no whole safetensors file"),
    "vast and empty": (one_tensor([2**62, 2**62, 0], [0, 0]), "no whole safetensors file"),
    "longer": (one_tensor([], [0, 1]) + b"x", "no whole safetensors file"),
    "wrong checksum": (one_tensor([1], [0, 1]), "checksum"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_removed(files: ContextFiles, name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, reason = FOREIGN[name]
    assert reason in rejects(files, data, caplog)


@pytest.mark.parametrize(("namespace", "key"), [("model-2", KEY), (SPACE, OTHER_KEY)])
def test_an_entry_in_the_place_of_another_is_removed(
    files: ContextFiles, namespace: str, key: PrefixKey, caplog: pytest.LogCaptureFixture
) -> None:
    assert files.write(namespace, key, {"a": torch.ones(2)}, {})
    data = path_of(files, namespace, key).read_bytes()
    files.remove(namespace, key)
    assert f"it holds {namespace}/{key} and not {SPACE}/{KEY}" in rejects(files, data, caplog)


def test_entries_of_another_version_are_removed(
    files: ContextFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("frozen_peft.context.store.context_files.VERSION", "0")
        assert files.write(SPACE, KEY, content(), METADATA)
    assert "no encoded context that this version wrote" in rejects(files, path_of(files).read_bytes(), caplog)


def test_a_removed_entry_can_be_written_again(files: ContextFiles, caplog: pytest.LogCaptureFixture) -> None:
    rejects(files, b"", caplog)
    tensors = content()
    assert files.write(SPACE, KEY, tensors, METADATA)
    assert files.keys(SPACE) == {KEY}
    assert same(files.read(SPACE, KEY)[0], tensors)
