# SPDX-License-Identifier: Apache-2.0
"""What is written where: every tensor of the base in its file, with what updates it.

transformers renames and regroups what it loads (experts stored one by one are stacked, prefixes differ between the
classes of one checkpoint). Its own conversions say which tensor becomes which parameter; run backwards on an update,
which is as large as the parameter, they cut it into the pieces that belong to the tensors of the checkpoint.
"""

import math
from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel

from frozen_peft.adapters.vocabulary import vocabulary_parameters
from frozen_peft.merging.quantized import Requantizer
from frozen_peft.merging.source import TORCH_DTYPES, Checkpoint
from frozen_peft.merging.updates import Update, same_update
from frozen_peft.merging.writing import OutputShard, OutputTensor, Piece
from frozen_peft.utils.compat.transformers import as_stored, kept_in_float32, parameters_of_tensors, stored_together

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
    homes = _find_homes(model, checkpoint, own, rows, loaded)
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


def _find_homes(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    updates: Mapping[str, Update],
    resized: Collection[str],
    loaded: Mapping[str, tuple[str, bool]],
) -> dict[str, Piece]:
    """The tensors of a checkpoint that updates change; those of `resized` may have other rows in the model."""
    stored = checkpoint.tensors
    plain = {parameter: name for name, (parameter, is_converted) in loaded.items() if not is_converted}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    homes: dict[str, Piece] = {}
    problems = []
    for name, update in updates.items():
        group: tuple[str, ...] = ()
        if name in plain:
            parts = {plain[name]: parameters[name]}
        else:
            group = stored_together(model, name)
            parts = as_stored(model, {other: parameters[other] for other in group})
            if not update.is_linear:
                problems.append(f"`{name}` is stored in parts, so only plain LoRA can be added to it")
        first = 1 if name in resized else 0
        for home, part in parts.items():
            homes[home] = Piece(name, group)
            found = stored[home].shape if home in stored else None
            if found is None or found[first:] != tuple(part.shape)[first:]:
                shown = "not in the checkpoint" if found is None else list(found)
                problems.append(f"`{home}` is {shown}, and the model's is {list(part.shape)}")
    if problems:
        raise ValueError(
            f"The adapter does not fit {checkpoint.folder}:\n  " + "\n  ".join(problems) + "\nThe base has to be the "
            "checkpoint that the adapter was trained on, with the same vocabulary."
        )
    return homes


def _tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the embedding's and the head's weight where they are one tensor; None where they are two."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def _untie(
    model: PreTrainedModel, updates: Mapping[str, Update], stored: Mapping[str, str]
) -> tuple[dict[str, Update], bool, dict[str, tuple[str, Piece | None]]]:
    """What becomes of a head that is the embedding.

    Returns:
        The updates of what the checkpoint has; whether the head becomes a tensor of its own; and where the checkpoint
        lacks it, its name and update there, by the name of the embedding whose values it begins with.
    """
    own, tied = dict(updates), _tied_head(model)
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
