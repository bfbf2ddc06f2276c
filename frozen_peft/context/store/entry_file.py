# SPDX-License-Identifier: Apache-2.0
"""One encoded context in one safetensors file, with a checksum of all that it holds."""

import json
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["read_entry", "write_entry"]

FORMAT = "frozen_peft.context"
VERSION = "1"


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


def read_entry(path: Path, entry: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads tensors, into the CPU's memory, and metadata.

    Raises:
        ValueError: The file is not whole, or not that entry; the message says why.
        OSError: There is no such file, or it cannot be read.
    """
    try:
        with path.open("rb") as held, safe_open(_name_of(held, path), "pt") as file:
            stamp = file.metadata() or {}
            _require_entry(stamp, entry)
            # Copies, since the library maps the file and another process may remove it. Copying, unlike reading the
            # file's bytes, lets other threads run.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is no whole safetensors file ({error})") from None
    if stamp.get("checksum") != _checksum(tensors, stamp.get("metadata")):
        raise ValueError("its checksum is wrong")
    return tensors, json.loads(stamp["metadata"])


def _name_of(file: BinaryIO, path: Path) -> str:
    """A name of this very file, also after another one has taken its place, where the system has such names.

    safetensors 0.8 opens a file twice, and would read the header of one and the tensors of the other.
    """
    name = Path(f"/dev/fd/{file.fileno()}")
    return str(name if name.exists() else path)


def _require_entry(stamp: dict[str, str], entry: str) -> None:
    if (stamp.get("format"), stamp.get("version")) != (FORMAT, VERSION):
        raise ValueError("it is no encoded context that this version wrote")
    if stamp.get("entry") != entry:
        raise ValueError(f"it holds {stamp.get('entry')} and not {entry}")


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
