# SPDX-License-Identifier: Apache-2.0
"""Shards of the merged model: tensors copied as they are, or read, updated in float32 and cast once, in their order.

What is alive: the factors of the adapter, and of the weight that is being written a block of rows in its own type, in
float32 and updated. Updates that need a whole matrix (TIES, DARE, DoRA of transposed weights, experts that the
checkpoint stores one by one) have it whole; so has a weight that is quantized first.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from frozen_peft.merging.header import TORCH_DTYPES, num_bytes_of, pack_header
from frozen_peft.merging.homes import Piece, cut_update
from frozen_peft.merging.source import Shard
from frozen_peft.merging.updates import Update

__all__ = ["OutputShard", "OutputTensor", "write_shards"]

BLOCK_BYTES = 8 << 20


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
        return num_bytes_of(self.dtype, self.shape)

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
        """Its first bytes."""
        return pack_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors], self.metadata)


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
            cutter = _Cutter(model, updates, shard.tensors)
            with (folder / shard.name).open("xb") as file:
                file.write(shard.header())
                for tensor in shard.tensors:
                    if tensor.is_copied:
                        tensor.shard.copy(tensor.source, file)
                    else:
                        for block in _blocks(tensor, updates, cutter):
                            file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    bar.update(tensor.num_bytes)


class _Cutter:
    """Updates of parameters that are stored in parts, each kept until its last part in this file is written."""

    def __init__(self, model: PreTrainedModel, updates: Mapping[str, Update], tensors: Sequence[OutputTensor]):
        self._model, self._updates = model, updates
        self._shapes = {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._parts: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
        self._left: dict[tuple[str, ...], int] = {}
        for tensor in tensors:
            if tensor.piece and tensor.piece.group:
                self._left[tensor.piece.group] = self._left.get(tensor.piece.group, 0) + 1

    def change(self, piece: Piece, name: str) -> torch.Tensor:
        """What is added to one part, float32 of its shape."""
        if piece.group not in self._parts:
            changes = {
                parameter: self._updates[parameter].apply(
                    torch.zeros(self._shapes[parameter]), 0, self._shapes[parameter][0]
                )
                for parameter in piece.group
                if parameter in self._updates
            }
            self._parts[piece.group] = cut_update(self._model, piece.group, changes)
        change = self._parts[piece.group].pop(name)
        self._left[piece.group] -= 1
        if not self._left[piece.group]:
            del self._parts[piece.group]
        return change


@torch.no_grad()
def _blocks(tensor: OutputTensor, updates: Mapping[str, Update], cutter: _Cutter) -> Iterator[torch.Tensor]:
    """The merged tensor, in blocks of its rows."""
    dtype = TORCH_DTYPES[tensor.dtype]
    for rows, start, stop in _read(tensor, updates):
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if tensor.piece is None:
            merged = rows
        elif tensor.piece.group:
            merged = rows + cutter.change(tensor.piece, tensor.name)
        else:
            merged = updates[tensor.piece.parameter].apply(rows, start, stop)
        merged = merged.to(dtype)
        if tensor.piece is not None and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"`{tensor.name}` is not finite after merging, in {tensor.dtype}: the adapter holds such values, or "
                "they are beyond that type (--dtype bf16 and fp32 reach further than fp16)."
            )
        yield merged


def _read(tensor: OutputTensor, updates: Mapping[str, Update]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """The tensor before its update, in blocks of rows if that can be, and the rows' numbers."""
    shape = tensor.shape
    num_rows = shape[0] if shape else 1
    whole = tensor.prepare is not None
    if tensor.piece is not None:
        whole = whole or bool(tensor.piece.group) or not updates[tensor.piece.parameter].by_rows
    if whole or not shape or not math.prod(shape):
        assert tensor.num_rows is None, "what the adapter holds as a whole is updated by rows"
        weight = tensor.shard.read(tensor.source)
        yield (weight if tensor.prepare is None else tensor.prepare(weight)), 0, num_rows
        return
    step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
    stored = tensor.shard.tensors[tensor.source].shape[0]
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        rows = tensor.shard.read(tensor.source, min(start, stored), min(stop, stored))
        # Rows that the base does not have; the adapter holds them.
        yield torch.cat([rows, rows.new_zeros(stop - start - len(rows), *shape[1:])]), start, stop
