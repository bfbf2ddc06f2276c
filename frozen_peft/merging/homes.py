# SPDX-License-Identifier: Apache-2.0
"""Where each parameter of a model lies in its checkpoint.

transformers renames and regroups what it loads (experts stored one by one are stacked, prefixes differ between the
classes of one checkpoint). Its own conversions say which tensor becomes which parameter; run backwards on an update,
which is as large as the parameter, they cut it into the pieces that belong to the tensors of the checkpoint.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    rename_source_key,
    revert_weight_conversion,
)

from frozen_peft.merging.source import Checkpoint
from frozen_peft.merging.updates import Update

__all__ = [
    "Piece",
    "cut_update",
    "find_homes",
    "load_config",
    "make_meta_model",
    "named_class",
    "parameters_of_tensors",
    "require_layers",
    "tied_head",
]


@dataclass(frozen=True)
class Piece:
    """What becomes of one tensor of the checkpoint.

    Attributes:
        parameter: The parameter of the model that it is, or is a part of.
        group: For a part: the parameters that the checkpoint stores together with this one; else empty.
    """

    parameter: str
    group: tuple[str, ...] = ()


def load_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ValueError: There is none, it cannot be read, or it needs code of its own that is not trusted.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers makes of a configuration that anyone may have written
        raise ValueError(f"{folder / 'config.json'} cannot be read by transformers: {error}") from error


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration names; None where it names none."""
    architectures = config.architectures
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def require_layers(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuses a configuration of more layers than there are tensors, which would take for ever to build.

    Raises:
        ValueError: It is one.
    """
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    num_tensors = sum(len(shard.tensors) for shard in checkpoint.shards)
    if not isinstance(num_layers, int) or num_layers <= num_tensors:
        return
    raise ValueError(
        f"{checkpoint.folder / 'config.json'} has {num_layers} layers, and the files beside it {num_tensors} tensors. "
        "Get them again from where they came from."
    )


def make_meta_model(config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """The class that the checkpoint names, without weights, in float32.

    Raises:
        ValueError: transformers has no such class, or cannot make it of this configuration.
    """
    # Building a model writes to its configuration.
    config = copy.deepcopy(config)
    make = _maker(config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            return make(config, dtype=torch.float32)
    except Exception as error:  # whatever sizes that anyone may have written lead to
        kind = type(error).__name__
        raise ValueError(f"transformers makes no model of this {type(config).__name__}: {kind}: {error}") from error


def _maker(config: PretrainedConfig, *, trust_remote_code: bool) -> Callable[..., PreTrainedModel]:
    """What makes a model of this configuration."""
    named = named_class(config)
    if named is not None:
        return named._from_config
    for automatic in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in automatic._model_mapping or trust_remote_code:
            return partial(automatic.from_config, trust_remote_code=trust_remote_code)
    raise ValueError(f"transformers has no model class {config.architectures!r} for {type(config).__name__}.")


def parameters_of_tensors(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Which parameter each tensor of a checkpoint is loaded into, and whether it is converted on the way.

    Tensors that the model does not load (a multi-token prediction head, say) are left out. The model then remembers
    the conversions that the checkpoint needs, as a loaded one does.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if renamed in state:
            found[name] = (renamed, pattern is not None)
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]
    return found


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
        ValueError: An update has no tensor to go to, or does not fit it.
    """
    shapes = {entry.name: entry.shape for _, entry in checkpoint.tensors()}
    loaded = parameters_of_tensors(model, shapes)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    homes: dict[str, Piece] = {}
    converted = {parameter for parameter, is_converted in loaded.values() if is_converted}
    plain = {parameter: name for name, (parameter, is_converted) in loaded.items() if not is_converted}
    problems = []
    for name, update in updates.items():
        problem = update.shape_problem(tuple(parameters[name].shape))
        if problem:
            problems.append(f"`{name}` is {list(parameters[name].shape)} and {problem}")
        elif name in plain:
            home = plain[name]
            own = shapes[home] if name not in resized else (parameters[name].shape[0], *shapes[home][1:])
            if own != tuple(parameters[name].shape):
                problems.append(f"`{home}` is {list(shapes[home])}, and the model's is {list(parameters[name].shape)}")
            homes[home] = Piece(name)
        else:
            group, pieces = _pieces(model, name)
            if name not in converted and not set(pieces) <= set(shapes):
                problems.append(f"`{name}` is not in the checkpoint")
                continue
            if not update.is_linear:
                problems.append(f"`{name}` is stored in parts, so only plain LoRA can be added to it")
            for home, shape in pieces.items():
                if shapes.get(home) != shape:
                    problems.append(f"`{home}` is {shapes.get(home)}, and `{name}` needs it to be {shape}")
                homes[home] = Piece(name, group)
    if problems:
        raise ValueError(
            f"The adapter does not fit {checkpoint.folder}:\n  " + "\n  ".join(problems) + "\nThe base has to be the "
            "checkpoint that the adapter was trained on, with the same vocabulary."
        )
    return homes


def cut_update(
    model: PreTrainedModel, group: Iterable[str], changes: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Changes of parameters that are stored in parts, by the names of the parts.

    Args:
        model: The base model on the meta device.
        group: Parameters that are stored together.
        changes: float32, of some of them; the others do not change.
    """
    whole = dict(model.named_parameters(remove_duplicate=False))
    full = {name: changes[name] if name in changes else torch.zeros(whole[name].shape) for name in group}
    return revert_weight_conversion(model, full)


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the embedding's and the head's weight where they are one tensor; None where they are two."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def _pieces(model: PreTrainedModel, name: str) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """The parameters that are stored together with one, and the names and shapes of their parts in the checkpoint."""
    reverse = [entry.reverse_transform() for entry in (model._weight_conversions or [])[::-1]]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    key, pattern = apply_converters(name, converters)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    group: tuple[str, ...] = (name,)
    if pattern is not None:
        group = tuple(other for other in parameters if apply_converters(other, converters)[0] == key)
    parts: dict[str, Any] = revert_weight_conversion(model, {other: parameters[other] for other in group})
    return group, {part: tuple(tensor.shape) for part, tensor in parts.items()}
