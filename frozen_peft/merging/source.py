# SPDX-License-Identifier: Apache-2.0
"""A base checkpoint: its folder, shards and index, read tensor by tensor."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from frozen_peft.merging.header import TORCH_DTYPES, TensorEntry, read_header

__all__ = [
    "ALLOW_PICKLE",
    "Checkpoint",
    "PickleShard",
    "SafetensorsShard",
    "Shard",
    "find_folder",
    "load_tensors",
    "not_floating",
    "open_checkpoint",
    "read_json",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_WEIGHTS, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ALLOW_PICKLE = (
    "Loading a pickle can run code. Convert it to safetensors, or allow it with --allow-pickle (`allow_pickle=True`), "
    "which reads tensors only (`torch.load(weights_only=True)`)"
)
_COPY_BYTES = 1 << 22
_HUB_FILES = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.py",
    "LICENSE*",
)
_HUB_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")


class Shard(Protocol):
    """One file of weights."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a floating-point tensor, in its own type."""

    def copy(self, name: str, target: BinaryIO) -> None:
        """Writes a tensor's bytes as they are."""


class SafetensorsShard:
    """A safetensors file.

    Raises:
        ValueError: It is not a whole one.
    """

    def __init__(self, path: Path):
        header = read_header(path)
        self.path = path
        self.tensors = header.tensors
        self.metadata = header.metadata
        self._data_start = header.data_start

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a floating-point tensor, in its own type; all of them by default.

        Raises:
            ValueError: The tensor is of a type that nothing can be added to, such as a quantized one.
        """
        entry = self.tensors[name]
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(not_floating(name, self.path, entry.dtype))
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else stop
        row_bytes = entry.num_bytes // max(rows, 1)
        buffer = bytearray((stop - start) * row_bytes)
        with self.path.open("rb") as file:
            file.seek(self._data_start + entry.start + start * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{self.path} ended within `{name}`: it was changed while it was read.")
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        if not buffer:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def copy(self, name: str, target: BinaryIO) -> None:
        """Writes a tensor's bytes as they are."""
        entry = self.tensors[name]
        left = entry.num_bytes
        with self.path.open("rb") as file:
            file.seek(self._data_start + entry.start)
            while left:
                part = file.read(min(left, _COPY_BYTES))
                if not part:
                    raise ValueError(f"{self.path} ended within `{name}`: it was changed while it was read.")
                target.write(part)
                left -= len(part)


class PickleShard:
    """A file of `torch.save`, read with `weights_only=True`; its tensors stay in the mapped file until used.

    Raises:
        ValueError: It is not a file of named tensors.
    """

    _DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

    def __init__(self, path: Path):
        self.path = path
        self.metadata = {"format": "pt"}
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the unpickler of an arbitrary file raises
            raise ValueError(f"{path} cannot be read as a pickle of tensors: {error}") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ValueError(f"{path} does not hold named tensors.")
        self._tensors: dict[str, torch.Tensor] = loaded
        self.tensors = {
            name: TensorEntry(name, self._dtype(name), tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())
            for name, tensor in loaded.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, in its own type; all of them by default."""
        tensor = self._tensors[name]
        return (tensor[start:stop] if tensor.ndim else tensor).clone()

    def copy(self, name: str, target: BinaryIO) -> None:
        """Writes a tensor's bytes as they are."""
        target.write(self._tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        known = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL", **self._DTYPES}
        if dtype not in known:
            raise ValueError(f"`{name}` in {self.path} is of type {dtype}; convert the checkpoint to safetensors.")
        return known[dtype]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder.

    Attributes:
        folder: Where it is.
        shards: Its files, in the order of their names.
        indexed: Whether an index says which file holds what.
    """

    folder: Path
    shards: list[Shard]
    indexed: bool

    def tensors(self) -> Iterator[tuple[Shard, TensorEntry]]:
        """Every tensor, with the file that holds it."""
        for shard in self.shards:
            for entry in shard.tensors.values():
                yield shard, entry

    def shard_of(self, name: str) -> Shard:
        """The file that holds a tensor."""
        return next(shard for shard in self.shards if name in shard.tensors)


def find_folder(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    what: str = "the base model",
    allow_pickle: bool = False,
) -> Path:
    """The folder of a model or an adapter; one of the hub is downloaded, or found in the hub's cache.

    Of the hub's files only those are downloaded that a merge reads or copies: not the same weights in other forms.

    Raises:
        FileNotFoundError: There is no such folder, and the hub has none or cannot be asked.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    # Anything that can only be a path: a hub id is a name, or an owner and a name.
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or len(path.parts) > 2 or path.exists():
        raise FileNotFoundError(f"{what}: there is no folder {name_or_path} (looked in {Path.cwd()})")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, *(_HUB_PICKLES if allow_pickle else ())]
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{what}: {name_or_path!r} is no folder, and the hub gives none: {error}") from error


def open_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Reads the index and the headers of all files.

    Raises:
        ValueError: A file is missing, not whole, or a pickle that is not allowed; or the index says otherwise.
    """
    if (folder / INDEX).is_file():
        return _open_indexed(folder, INDEX, SafetensorsShard, ".safetensors")
    if (folder / WEIGHTS).is_file():
        return Checkpoint(folder, [SafetensorsShard(folder / WEIGHTS)], False)
    pickles = [name for name in (PICKLE_INDEX, PICKLE_WEIGHTS) if (folder / name).is_file()]
    if not pickles:
        raise ValueError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")
    if not allow_pickle:
        raise ValueError(f"{folder} has its weights only as a pickle, {pickles[0]}. {ALLOW_PICKLE}.")
    if pickles[0] == PICKLE_INDEX:
        return _open_indexed(folder, PICKLE_INDEX, PickleShard, ".bin")
    return Checkpoint(folder, [PickleShard(folder / PICKLE_WEIGHTS)], False)


def not_floating(name: str, path: Path, dtype: str) -> str:
    """What is wrong with a tensor of another type than the floating-point ones."""
    return (
        f"`{name}` in {path} is stored as {dtype}, to which no update can be added. Use the checkpoint in "
        f"{', '.join(TORCH_DTYPES)}."
    )


def load_tensors(folder: Path, stem: str, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a small file, `{stem}.safetensors` or, where that is allowed, `{stem}.bin`.

    Raises:
        ValueError: There is no such file, or it is not whole.
    """
    path, pickle = folder / f"{stem}.safetensors", folder / f"{stem}.bin"
    shard: Shard
    if path.is_file():
        shard = SafetensorsShard(path)
    elif not pickle.is_file():
        raise ValueError(f"{folder} holds no {path.name}.")
    elif not allow_pickle:
        raise ValueError(f"{folder} has its weights only as a pickle, {pickle.name}. {ALLOW_PICKLE}.")
    else:
        shard = PickleShard(pickle)
    return {name: shard.read(name) for name in shard.tensors}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: There is none, or the file is something else.
    """
    # What is no file, such as a pipe, may never end.
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object.")
    return values


def _open_indexed(folder: Path, index: str, shard_type: Any, suffix: str) -> Checkpoint:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / index} has no `weight_map`.")
    for tensor, name in weight_map.items():
        # Files of the same names are written to the output, beside others that have theirs.
        is_name = isinstance(name, str) and name.endswith(suffix) and not name.startswith(".") and len(name) <= 128
        if not is_name or any(mark in name for mark in "/\\\0"):
            raise ValueError(
                f"{folder / index} places `{tensor}` in {name!r}, which is no name of a {suffix} file beside it."
            )
    missing = [name for name in sorted(set(weight_map.values())) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names. Download it again.")
    shards = [shard_type(folder / name) for name in sorted(set(weight_map.values()))]
    held = {tensor: shard.path.name for shard in shards for tensor in shard.tensors}
    for tensor in sorted(set(held) | set(weight_map)):
        if held.get(tensor) != weight_map.get(tensor):
            raise ValueError(
                f"{folder / index} places `{tensor}` in {weight_map.get(tensor)}, and it is in {held.get(tensor)}."
            )
    if sum(len(shard.tensors) for shard in shards) != len(held):
        raise ValueError(f"A tensor is in two files of {folder}.")
    return Checkpoint(folder, shards, True)
