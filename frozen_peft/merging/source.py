# SPDX-License-Identifier: Apache-2.0
"""A base checkpoint: its folder, shards and index, read tensor by tensor."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from frozen_peft.adapters.pickles import require_no_pickle
from frozen_peft.utils.files import read_json

__all__ = [
    "INDEX",
    "TORCH_DTYPES",
    "Checkpoint",
    "PickleShard",
    "Shard",
    "TensorEntry",
    "find_folder",
    "open_checkpoint",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_WEIGHTS, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types that an update can be added to, by their names in a safetensors header."""
_OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
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


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: Type as a safetensors header names it.
        shape: Its shape.
        start: Offset of its first byte in the file.
        num_bytes: Its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Shard:
    """A safetensors file, of which no more is in memory than what is asked for.

    Attributes:
        path: Where it is.
        tensors: By name, in the order of their bytes.
        metadata: The header's `__metadata__`.

    Raises:
        ValueError: It is not a whole one.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # Checks the header. Read by pieces: what is mapped into memory counts as the process's own.
            self._file = safe_open(path, "pt", backend="pread")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no whole safetensors file: {error}. Get it again from where it came from."
            ) from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors = {}
        for name, item in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = item["data_offsets"]
            self.tensors[name] = TensorEntry(item["dtype"], tuple(item["shape"]), 8 + length + start, stop - start)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, in its own type; all of it by default."""
        if stop is None:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[start:stop]

    def copy(self, name: str, target: BinaryIO) -> None:
        """Writes a tensor's bytes as they are, whatever its type."""
        entry = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.num_bytes
            while left and (part := file.read(min(left, _COPY_BYTES))):
                target.write(part)
                left -= len(part)
        if left:
            raise ValueError(f"{self.path} ended within `{name}`: it was changed while it was read.")


class PickleShard(Shard):
    """A file of `torch.save`, read with `weights_only=True`; its tensors stay in the mapped file until used.

    Raises:
        ValueError: It is not a file of named tensors.
    """

    def __init__(self, path: Path):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the unpickler of an arbitrary file raises
            raise ValueError(f"{path} cannot be read as a pickle of tensors: {error}") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise ValueError(f"{path} does not hold named tensors.")
        self.path = path
        self.metadata = {"format": "pt"}
        self._loaded: dict[str, torch.Tensor] = loaded
        names = {dtype: name for name, dtype in (TORCH_DTYPES | _OTHER_DTYPES).items()}
        self.tensors = {}
        for name, tensor in loaded.items():
            if tensor.dtype not in names:
                raise ValueError(
                    f"`{name}` in {path} is of type {tensor.dtype}; convert the checkpoint to safetensors."
                )
            self.tensors[name] = TensorEntry(names[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, in its own type; all of it by default."""
        tensor = self._loaded[name]
        return (tensor if stop is None else tensor[start:stop]).clone()

    def copy(self, name: str, target: BinaryIO) -> None:
        """Writes a tensor's bytes as they are."""
        target.write(self._loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


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

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor, by its name."""
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}

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
    if not allow_pickle:
        require_no_pickle(folder)
    for weights, index, shard_type in ((WEIGHTS, INDEX, Shard), (PICKLE_WEIGHTS, PICKLE_INDEX, PickleShard)):
        if (folder / index).is_file():
            return Checkpoint(folder, _indexed_shards(folder, index, shard_type), True)
        if (folder / weights).is_file():
            return Checkpoint(folder, [shard_type(folder / weights)], False)
    raise ValueError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")


def _indexed_shards(folder: Path, index: str, shard_type: type[Shard]) -> list[Shard]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / index} has no `weight_map`.")
    suffix = ".safetensors" if shard_type is Shard else ".bin"
    for tensor, name in weight_map.items():
        # Files of the same names are written to the output, beside others that have theirs.
        is_name = isinstance(name, str) and name.endswith(suffix) and not name.startswith(".") and len(name) <= 128
        if not is_name or any(mark in name for mark in "/\\\0"):
            raise ValueError(
                f"{folder / index} places `{tensor}` in {name!r}, which is no name of a {suffix} file beside it."
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names. Download it again.")
    shards = [shard_type(folder / name) for name in names]
    held = {(tensor, shard.path.name) for shard in shards for tensor in shard.tensors}
    misplaced = {tensor for tensor, _ in held ^ set(weight_map.items())}
    if misplaced:
        tensor = min(misplaced)
        found = [shard.path.name for shard in shards if tensor in shard.tensors]
        raise ValueError(
            f"{folder / index} places `{tensor}` in {weight_map.get(tensor)}, and it is in "
            f"{' and '.join(found) or 'none of its files'}."
        )
    return shards
