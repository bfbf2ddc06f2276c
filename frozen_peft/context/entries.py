# SPDX-License-Identifier: Apache-2.0
"""One encoded context in one safetensors file, with a checksum of all that it holds.

The library writes the file, and any of its readers reads it. Here it is read into tensors of our own, because neither
of those readers fits. One maps the file: a file that another process cuts off, or deletes over a network, then kills
the run with a signal. The other takes the file's bytes: it copies them all while it keeps every other thread of Python
waiting, and needs twice the memory.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors.torch import save_file

__all__ = ["check_dtypes", "read_entry", "write_entry"]

FORMAT = "frozen_peft.context"
VERSION = "1"
# The limit of the safetensors format itself.
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# A tensor's type and shape, and where its bytes begin and end in the data.
Span = tuple[torch.dtype, list[int], int, int]


def check_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """Refuses what could be written but not read.

    Raises:
        ValueError: A tensor has a type that entries cannot hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"`{name}` is {tensor.dtype}, which a file of an encoded context cannot hold.")


def write_entry(path: Path, entry: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors, on any device, to a file that knows which entry it is.

    Raises:
        SafetensorError: The file cannot be written.
        RuntimeError: Tensors overlap in memory.
    """
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    stamp = {
        "format": FORMAT,
        "version": VERSION,
        "entry": entry,
        "metadata": text,
        "checksum": _checksum(packed, text),
    }
    save_file(packed, path, metadata=stamp)


def read_entry(file: BinaryIO, entry: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads tensors, into the CPU's memory, and metadata.

    Raises:
        ValueError: The file is not whole, or not that entry; the message says why.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    data_start = 8 + header_bytes
    if not 0 < header_bytes <= MAX_HEADER_BYTES or data_start > num_bytes:
        raise ValueError("it is cut off, or no safetensors file")
    stamp, spans = _parse_header(file.read(header_bytes), entry)
    if max((end for *_, end in spans.values()), default=0) != num_bytes - data_start:
        raise ValueError("it is cut off, or longer than its header says")
    tensors = {name: _read_tensor(file, data_start, *span) for name, span in spans.items()}
    if stamp.get("checksum") != _checksum(tensors, stamp.get("metadata")):
        raise ValueError("its checksum is wrong")
    return tensors, json.loads(stamp["metadata"])


def _parse_header(data: bytes, entry: str) -> tuple[dict[str, Any], dict[str, Span]]:
    try:
        header = json.loads(data)
        stamp = header.pop("__metadata__", {})
        found = [stamp.get(name) for name in ("format", "version", "entry")]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError("its header is damaged, or none of safetensors") from None
    if found[:2] != [FORMAT, VERSION]:
        raise ValueError("it is no encoded context that this version wrote")
    if found[2] != entry:
        raise ValueError(f"it holds {found[2]} and not {entry}")
    try:
        return stamp, {name: _span(description) for name, description in header.items()}
    except (ValueError, TypeError, KeyError):
        raise ValueError("its header is damaged") from None


def _span(description: dict[str, Any]) -> Span:
    """What a header says of a tensor, sane enough to make room for it."""
    dtype, shape = DTYPES[description["dtype"]], description["shape"]
    begin, end = description["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in [*shape, begin, end]):
        raise ValueError(f"sizes must be whole numbers, found {shape}, {begin}, {end}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} of {dtype} does not take the bytes from {begin} to {end}")
    # Only beside a zero can a dimension be anything; PyTorch computes strides from it.
    if math.prod(max(size, 1) for size in shape) >= 2**48:
        raise ValueError(f"no tensor has the shape {shape}")
    return dtype, shape, begin, end


def _read_tensor(
    file: BinaryIO, data_start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int
) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    file.seek(data_start + begin)
    if file.readinto(_bytes_of(tensor)) != end - begin:  # type: ignore[attr-defined]
        raise ValueError("it is cut off")
    return tensor


def _checksum(tensors: dict[str, torch.Tensor], metadata: object) -> str:
    """XXH3 of 128 bits over the metadata and the tensors' names, types, shapes and bytes."""
    names = sorted(tensors)
    described = [metadata, [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    state = xxhash.xxh3_128(json.dumps(described).encode())
    for name in names:
        state.update(_bytes_of(tensors[name]))
    return state.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's own memory, as bytes because NumPy has no bfloat16."""
    return tensor.view(-1).view(torch.uint8).numpy().data
