# SPDX-License-Identifier: Apache-2.0
"""Where each parameter of a model lies in its checkpoint.

transformers renames and regroups what it loads (experts stored one by one are stacked, prefixes differ between the
classes of one checkpoint). Its own conversions say which tensor becomes which parameter; run backwards on an update,
which is as large as the parameter, they cut it into the pieces that belong to the tensors of the checkpoint.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from frozen_peft.merging.source import Checkpoint
from frozen_peft.merging.updates import Update
from frozen_peft.utils.compat.transformers import as_stored, parameters_of_tensors, stored_together

__all__ = ["Piece", "find_homes", "tied_head"]


@dataclass(frozen=True)
class Piece:
    """What becomes of one tensor of the checkpoint.

    Attributes:
        parameter: The parameter of the model that it is, or is a part of.
        group: For a part: the parameters that the checkpoint stores together with this one; else empty.
    """

    parameter: str
    group: tuple[str, ...] = ()


def find_homes(
    model: PreTrainedModel, checkpoint: Checkpoint, updates: Mapping[str, Update], resized: Collection[str] = ()
) -> dict[str, Piece]:
    """The tensors of a checkpoint that updates change.

    Args:
        model: The base model on the meta device.
        checkpoint: Its checkpoint.
        updates: By the name of the parameter.
        resized: Parameters that may have other rows in the model.

    Raises:
        ValueError: An update has no tensor to go to, or the tensor is not the model's.
    """
    stored = checkpoint.tensors
    loaded = parameters_of_tensors(model, stored)
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


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the embedding's and the head's weight where they are one tensor; None where they are two."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"
