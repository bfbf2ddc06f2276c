# SPDX-License-Identifier: Apache-2.0
"""Shards of the merged model: tensors copied as they are, or read, updated in float32 and cast once, in their order.

What is alive: the factors of the adapter, and of the weight that is being written a block of rows in its own type, in
float32 and updated. Updates that need a whole matrix (TIES, DARE, DoRA of transposed weights, experts that the
checkpoint stores one by one) have it whole; so has a weight that is quantized first. The library writes files from
tensors that are all in memory, so their headers are written here.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from frozen_peft.merging.source import INDEX, TORCH_DTYPES, Shard
from frozen_peft.merging.updates import Update
from frozen_peft.utils.compat.transformers import as_stored

__all__ = ["OutputShard", "OutputTensor", "Piece", "write_index", "write_shards"]

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """What becomes of one tensor of the checkpoint.

    Attributes:
        parameter: The parameter of the model that it is, or is a part of.
        group: For a part: the parameters that the checkpoint stores together with this one; else empty.
    """

    parameter: str
    group: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
        name: Its name in the output.
        shard: The file of the base that its values come from.
        source: Its name there.
        dtype: The type it is written in, as a header names it.
        piece: What updates it, if anything does.
        prepare: What is done to it before, to the whole tensor in its own type: it is quantized and de-quantized.
        num_rows: Its rows, where the vocabulary has another size than the base's; None: as many as there.
    """

    name: str
    shard: Shard
    source: str
    dtype: str
    piece: Piece | None = None
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
    num_rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        shape = self.shard.tensors[self.source].shape
        return shape if self.num_rows is None else (self.num_rows, *shape[1:])

    @property
    def num_bytes(self) -> int:
        """Bytes in the output."""
        if self.dtype not in TORCH_DTYPES:
            return self.shard.tensors[self.source].num_bytes
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are those of the base."""
        return self.piece is None and self.prepare is None and self.dtype == self.shard.tensors[self.source].dtype


@dataclass(frozen=True)
class OutputShard:
    """A file to write: its name and what it holds, in this order."""

    name: str
    tensors: list[OutputTensor]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header()) + sum(tensor.num_bytes for tensor in self.tensors)

    def header(self) -> bytes:
        """Its first bytes (https://github.com/huggingface/safetensors, "Format")."""
        values: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.num_bytes
            values[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        # Tensors then begin at a multiple of eight, as the library writes them.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def write_shards(
    shards: Sequence[OutputShard], folder: Path, updates: Mapping[str, Update], model: PreTrainedModel
) -> None:
    """Writes all files.

    Args:
        shards: What to write.
        folder: Where to.
        updates: By the name of the parameter.
        model: The base model on the meta device.

    Raises:
        ValueError: A merged weight is not finite in the type it is written in.
    """
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, delay=2) as bar:
        for shard in shards:
            cutter = _Cutter(model, updates, shard)
            with (folder / shard.name).open("xb") as file:
                file.write(shard.header())
                for tensor in shard.tensors:
                    if tensor.is_copied:
                        tensor.shard.copy(tensor.source, file)
                    else:
                        for block in _blocks(tensor, updates, cutter):
                            file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    bar.update(tensor.num_bytes)


def write_index(folder: Path, shards: Sequence[OutputShard]) -> None:
    """Writes the index, as transformers does."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    sizes = [tensor.num_bytes for shard in shards for tensor in shard.tensors]
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class _Cutter:
    """Updates of parameters that are stored in parts, each kept until its last part in one file is written."""

    def __init__(self, model: PreTrainedModel, updates: Mapping[str, Update], shard: OutputShard):
        self._model, self._updates = model, updates
        self._names = {tensor.name for tensor in shard.tensors}
        self._parts: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def change(self, piece: Piece, name: str) -> torch.Tensor:
        """What is added to one part, float32 of its shape."""
        if piece.group not in self._parts:
            parts = as_stored(self._model, {parameter: self._whole(parameter) for parameter in piece.group})
            self._parts[piece.group] = {part: parts[part] for part in parts if part in self._names}
        left = self._parts[piece.group]
        change = left.pop(name)
        if not left:
            del self._parts[piece.group]
        return change

    def _whole(self, parameter: str) -> torch.Tensor:
        zeros = torch.zeros(self._model.get_parameter(parameter).shape)
        return self._updates[parameter].apply(zeros, 0, len(zeros)) if parameter in self._updates else zeros


@torch.no_grad()
def _blocks(tensor: OutputTensor, updates: Mapping[str, Update], cutter: _Cutter) -> Iterator[torch.Tensor]:
    """The merged tensor, in blocks of its rows."""
    for rows, start, stop in _read(tensor, updates):
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if tensor.piece is None:
            merged = rows
        elif tensor.piece.group:
            merged = rows + cutter.change(tensor.piece, tensor.name)
        else:
            merged = updates[tensor.piece.parameter].apply(rows, start, stop)
        merged = merged.to(TORCH_DTYPES[tensor.dtype])
        if tensor.piece is not None and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"`{tensor.name}` is not finite after merging, in {tensor.dtype}: the adapter holds such values, or "
                "they are beyond that type (--dtype bf16 and fp32 reach further than fp16)."
            )
        yield merged


def _read(tensor: OutputTensor, updates: Mapping[str, Update]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """The tensor before its update, in blocks of rows if that can be, and the rows' numbers."""
    shape, piece = tensor.shape, tensor.piece
    by_rows = piece is None or (not piece.group and updates[piece.parameter].by_rows)
    if tensor.prepare is not None or not by_rows or not math.prod(shape) or not shape:
        assert tensor.num_rows is None, "what the adapter holds as a whole is updated by rows"
        weight = tensor.shard.read(tensor.source)
        yield (weight if tensor.prepare is None else tensor.prepare(weight)), 0, len(weight) if shape else 1
        return
    step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield _rows(tensor, start, stop), start, stop


def _rows(tensor: OutputTensor, start: int, stop: int) -> torch.Tensor:
    """Rows of the base; zeros for those that it does not have, which the adapter holds."""
    entry = tensor.shard.tensors[tensor.source]
    num_there = entry.shape[0]
    if stop <= num_there:
        return tensor.shard.read(tensor.source, start, stop)
    rows = torch.zeros(stop - start, *entry.shape[1:], dtype=TORCH_DTYPES[entry.dtype])
    if start < num_there:
        rows[: num_there - start] = tensor.shard.read(tensor.source, start, num_there)
    return rows
