# SPDX-License-Identifier: Apache-2.0
"""What is written where: every tensor of the base in its file, with what updates it."""

import math
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from frozen_peft.adapters.vocabulary import vocabulary_parameters
from frozen_peft.merging.homes import Piece, find_homes, tied_head
from frozen_peft.merging.quantized import Requantizer
from frozen_peft.merging.source import TORCH_DTYPES, Checkpoint
from frozen_peft.merging.updates import Update, same_update
from frozen_peft.merging.writing import OutputShard, OutputTensor
from frozen_peft.utils.compat.transformers import as_stored, kept_in_float32, parameters_of_tensors

__all__ = ["plan_shards"]

_HEADER_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def plan_shards(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    updates: Mapping[str, Update],
    dtype: torch.dtype | None,
    quantized: Requantizer | None = None,
) -> tuple[list[OutputShard], bool]:
    """What to write, and whether embedding and head are no longer one tensor.

    Args:
        checkpoint: The base's weights.
        model: The base model on the meta device.
        updates: By the name of the parameter.
        dtype: The type of the weights; None: every tensor keeps its own.
        quantized: Which weights are quantized and de-quantized before; None: none.

    Raises:
        ValueError: An update has no tensor to go to, or does not fit it.
    """
    loaded = parameters_of_tensors(model, checkpoint.tensors)
    stored = {parameter: name for name, (parameter, _) in loaded.items()}
    rows = _resized(model, checkpoint, stored)
    own, untied, new_heads = _untie(model, updates, stored)
    homes = find_homes(model, checkpoint, own, rows)
    kept = kept_in_float32(model, dtype)
    shards = []
    for shard in checkpoint.shards:
        tensors = []
        for name, entry in shard.tensors.items():
            parameter, is_converted = loaded.get(name, (name, False))
            prepare = None if quantized is None else quantized.prepare(parameter)
            if (name in homes or prepare is not None) and entry.dtype not in TORCH_DTYPES:
                raise ValueError(
                    f"`{name}` in {shard.path} is stored as {entry.dtype}, to which no update can be added. Use the "
                    f"checkpoint in {', '.join(TORCH_DTYPES)}."
                )
            if prepare is not None and is_converted:
                raise ValueError(
                    f"`{parameter}` was in 4 bit in training, and the checkpoint stores it in parts (`{name}`), which "
                    "is not merged onto. Merge onto the weights as they are."
                )
            written = entry.dtype
            if dtype is not None and entry.dtype in TORCH_DTYPES and not (kept and kept.search(parameter)):
                written = _HEADER_NAMES[dtype]
            num_rows = rows.get(parameter)
            tensors.append(OutputTensor(name, shard, name, written, homes.get(name), prepare, num_rows))
            if name in new_heads:
                head, piece = new_heads[name]
                tensors.append(OutputTensor(head, shard, name, written, piece, num_rows=num_rows))
        if dtype is not None:
            # Largest items first keeps every tensor at a multiple of its item's size.
            tensors.sort(key=lambda tensor: -tensor.num_bytes / max(1, math.prod(tensor.shape)))
        shards.append(OutputShard(_output_name(shard.path.name), tensors, {"format": "pt", **shard.metadata}))
    return shards, untied


def _untie(
    model: PreTrainedModel, updates: Mapping[str, Update], stored: Mapping[str, str]
) -> tuple[dict[str, Update], bool, dict[str, tuple[str, Piece | None]]]:
    """What becomes of a head that is the embedding.

    Returns:
        The updates of what the checkpoint has; whether the head becomes a tensor of its own; and where the checkpoint
        lacks it, its name and update there, by the name of the embedding whose values it begins with.
    """
    own, tied = dict(updates), tied_head(model)
    if tied is None or not any(name in updates for name in tied):
        return own, False, {}
    embedding, head = tied
    untied = not same_update(updates.get(embedding), updates.get(head))
    if head in stored:
        return own, untied, {}
    piece = Piece(head) if own.pop(head, None) else None
    if not untied:
        return own, False, {}
    (name,) = as_stored(model, {head: model.get_parameter(head)})
    return own, True, {stored[embedding]: (name, piece)}


def _resized(model: PreTrainedModel, checkpoint: Checkpoint, stored: Mapping[str, str]) -> dict[str, int]:
    """Rows of embedding and head in the model, by the name of the parameter, where the checkpoint has others."""
    tensors = checkpoint.tensors
    rows = {name: len(model.get_parameter(name)) for name in vocabulary_parameters(model) if name in stored}
    return {name: number for name, number in rows.items() if number != tensors[stored[name]].shape[0]}


def _output_name(name: str) -> str:
    """A file's name; what was a pickle is safetensors now."""
    if not name.endswith(".bin"):
        return name
    return name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
