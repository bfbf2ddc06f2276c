# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: read with every field checked, and written.

A file is eight bytes with the header's length, the header, a JSON object of `{name: {dtype, shape, data_offsets}}`,
and the tensors' bytes without gap or overlap (https://github.com/huggingface/safetensors, "Format"). Read here and not
by the library, which maps a file into memory: a merge copies what it does not change as bytes, and reads the rest in
blocks of rows.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["ITEM_BITS", "TORCH_DTYPES", "Header", "TensorEntry", "pack_header", "read_header"]

# As the library limits it.
MAX_HEADER_BYTES = 100_000_000

ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Floating-point types that an update can be added to, by their names in a header."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Type as the header names it.
        shape: Its shape.
        start: Offset of its first byte, counted from the end of the header.
        num_bytes: Its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """What a file holds.

    Attributes:
        tensors: By name, in the order of their bytes.
        metadata: The file's `__metadata__`.
        data_start: Offset of the first tensor's bytes in the file.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def num_bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; its bits have to fill them."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def read_header(path: Path) -> Header:
    """Reads and checks a file's header; the tensors are not read.

    Raises:
        ValueError: The file is no whole safetensors file; the message names it and what is wrong.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _corrupt(path, f"its {size} bytes cannot hold a header of {length}")
        text = file.read(length)
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise _corrupt(path, f"its header is a JSON {type(values).__name__}, not an object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "`__metadata__` is not an object of texts")
    entries = sorted((_entry(path, name, value) for name, value in values.items()), key=lambda entry: entry.start)
    end = 0
    for entry in entries:
        if entry.start != end:
            raise _corrupt(path, f"the bytes of `{entry.name}` begin at {entry.start}, those before end at {end}")
        end += entry.num_bytes
    if end != size - 8 - length:
        raise _corrupt(path, f"its header describes {end} bytes of tensors, and it has {size - 8 - length}")
    return Header({entry.name: entry for entry in entries}, metadata, 8 + length)


def pack_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a file that holds these tensors (name, type, shape), in this order."""
    values: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + num_bytes_of(dtype, shape)
        values[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # Tensors then begin at a multiple of eight, as the library writes them.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"`{name}` needs dtype, shape and data_offsets, and has {_shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _corrupt(path, f"`{name}` is of an unknown type {_shown(dtype)}")
    if not _sizes(shape):
        raise _corrupt(path, f"`{name}` has the shape {_shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _corrupt(path, f"`{name}` has the offsets {_shown(offsets)}")
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        raise _corrupt(
            path, f"`{name}`, {dtype} of {_shown(shape)}, is {bits / 8:g} bytes, not {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1] - offsets[0])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice")
    return values


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _corrupt(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is no whole safetensors file: {problem}. Get it again from where it came from.")
