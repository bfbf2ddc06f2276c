# SPDX-License-Identifier: Apache-2.0
"""What is written where: every tensor of the base in its file, with what updates it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion

from frozen_peft.adapters.vocabulary import vocabulary_parameters
from frozen_peft.merging.header import ITEM_BITS, TORCH_DTYPES
from frozen_peft.merging.homes import Piece, find_homes, parameters_of_tensors, tied_head
from frozen_peft.merging.quantized import Requantizer
from frozen_peft.merging.source import Checkpoint, not_floating
from frozen_peft.merging.updates import Update, same_update
from frozen_peft.merging.writing import OutputShard, OutputTensor

__all__ = ["DTYPES", "dtype_name", "plan_shards"]

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Types of the output by their names here, as a header names them."""


@dataclass(frozen=True)
class _NewHead:
    """A head that was the embedding, and gets weights of its own.

    Attributes:
        name: Its weight's name in the checkpoint.
        embedding: The tensor whose values it has.
        piece: What updates it.
    """

    name: str
    embedding: str
    piece: Piece | None


def dtype_name(dtype: str | torch.dtype) -> str | None:
    """One of `DTYPES` for a type, by that name or by torch's and transformers'; None where it is no such type."""
    torch_names = {str(TORCH_DTYPES[written]): name for name, written in DTYPES.items()}
    text = str(dtype)
    return text if text in DTYPES else torch_names.get(f"torch.{text.removeprefix('torch.')}")


def plan_shards(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    updates: Mapping[str, Update],
    dtype: str | None,
    quantized: Requantizer | None = None,
) -> tuple[list[OutputShard], bool]:
    """What to write, and whether embedding and head are no longer one tensor.

    Args:
        checkpoint: The base's weights.
        model: The base model on the meta device.
        updates: By the name of the parameter.
        dtype: One of `DTYPES`; None: every tensor keeps its own.
        quantized: Which weights are quantized and de-quantized before; None: none.

    Raises:
        ValueError: An update has no tensor to go to, or does not fit it.
    """
    loaded = parameters_of_tensors(model, [entry.name for _, entry in checkpoint.tensors()])
    stored = {parameter: name for name, (parameter, _) in loaded.items()}
    tied = tied_head(model)
    untied, new_head, own = False, None, dict(updates)
    if tied is not None and any(name in updates for name in tied):
        embedding, head = tied
        untied = not (all(name in updates for name in tied) and same_update(updates[embedding], updates[head]))
        if head not in stored:
            piece = Piece(head) if own.pop(head, None) else None
            if untied:
                new_head = _new_head(model, head, stored[embedding], piece)
    rows = _resized(model, checkpoint, stored)
    homes = find_homes(model, checkpoint, own, rows)
    kept = _kept_in_fp32(model, dtype)
    shards = []
    for shard in checkpoint.shards:
        tensors = []
        for name, entry in shard.tensors.items():
            parameter = loaded[name][0] if name in loaded else name
            cast = dtype is not None and entry.dtype in TORCH_DTYPES and not (kept and kept.search(parameter))
            written = DTYPES[dtype] if cast and dtype else entry.dtype
            prepare = None if quantized is None else quantized.prepare(parameter)
            if (name in homes or prepare is not None) and entry.dtype not in TORCH_DTYPES:
                raise ValueError(not_floating(name, shard.path, entry.dtype))
            if prepare is not None and loaded[name][1]:
                raise ValueError(
                    f"`{parameter}` was in 4 bit in training, and the checkpoint stores it in parts (`{name}`), which "
                    "is not merged onto. Merge onto the weights as they are."
                )
            num_rows = rows.get(parameter)
            tensors.append(OutputTensor(name, shard, name, written, homes.get(name), prepare, num_rows))
            if new_head is not None and name == new_head.embedding:
                tensors.append(OutputTensor(new_head.name, shard, name, written, new_head.piece, num_rows=num_rows))
        if dtype is not None:
            # Largest items first keeps every tensor at a multiple of its item's size.
            tensors.sort(key=lambda tensor: -ITEM_BITS[tensor.dtype])
        shards.append(OutputShard(_output_name(shard.path.name), tensors, {"format": "pt", **shard.metadata}))
    return shards, untied


def _resized(model: PreTrainedModel, checkpoint: Checkpoint, stored: Mapping[str, str]) -> dict[str, int]:
    """Rows of embedding and head in the model, by the name of the parameter, where the checkpoint has others."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
    return {
        name: parameters[name].shape[0]
        for name in vocabulary_parameters(model)
        if name in stored and shapes[stored[name]][0] != parameters[name].shape[0]
    }


def _new_head(model: PreTrainedModel, head: str, embedding: str, piece: Piece | None) -> _NewHead:
    parameter = dict(model.named_parameters(remove_duplicate=False))[head]
    (name,) = revert_weight_conversion(model, {head: parameter})
    return _NewHead(name, embedding, piece)


def _kept_in_fp32(model: PreTrainedModel, dtype: str | None) -> re.Pattern[str] | None:
    """What transformers keeps in float32 whatever the type asked for; a pattern of parameter names."""
    names: set[str] = set()
    if dtype in ("bf16", "fp16"):
        names.update(model._keep_in_fp32_modules_strict or ())
    if dtype == "fp16":
        names.update(model._keep_in_fp32_modules or ())
    return build_glob_alternation(sorted(names))[0] if names else None


def _output_name(name: str) -> str:
    """A file's name; what was a pickle is safetensors now."""
    return (
        name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
        if name.endswith(".bin")
        else name
    )
