# SPDX-License-Identifier: Apache-2.0
"""What of transformers is used beyond what it promises."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    build_glob_alternation,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "as_stored",
    "attention_implementation",
    "checkpoint_function",
    "from_config",
    "keeping_cache_under_checkpointing",
    "kept_in_float32",
    "parameters_of_tensors",
    "replace_kernels",
    "set_checkpoint_function",
    "stored_together",
]


# PRIVATE: `PretrainedConfig._attn_implementation`, transformers 5.23 and 5.24.
# Why: `set_attn_implementation` is public, and there is nothing to ask what was set. Goes when: there is.
def attention_implementation(config: PretrainedConfig) -> str | None:
    """The name of the attention function that a model of this configuration calls."""
    return config._attn_implementation


# PRIVATE: `PreTrainedModel._from_config`, transformers 5.23 and 5.24.
# Why: a model of one class, in the type asked for; automatic classes choose the class themselves. Goes when: a model
# class can be asked for a type by a public method.
def from_config(model_class: type[PreTrainedModel], config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of a class, not loaded."""
    return model_class._from_config(config, **options)


# PRIVATE: `transformers.core_model_loading`, `conversion_mapping` and `PreTrainedModel._weight_conversions`,
# transformers 5.23 and 5.24.
# Why: only transformers knows which tensors of a checkpoint a parameter is made of. Goes when: transformers says it
# of a model that is not loaded.
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


def stored_together(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """The parameters that a checkpoint stores in the same tensors as one; asked after `parameters_of_tensors`."""
    reverse = [entry.reverse_transform() for entry in (model._weight_conversions or [])[::-1]]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    key, pattern = apply_converters(name, converters)
    if pattern is None:
        return (name,)
    others = (other for other, _ in model.named_parameters(remove_duplicate=False))
    return tuple(other for other in others if apply_converters(other, converters)[0] == key)


def as_stored(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of parameters, of all that are stored together, by the names of a checkpoint and cut as it has them."""
    return revert_weight_conversion(model, tensors)


# PRIVATE: `PreTrainedModel._keep_in_fp32_modules` and `_keep_in_fp32_modules_strict`, transformers 5.23 and 5.24.
# Why: a checkpoint in 16 bit whose sensitive weights are in 16 bit too loses precision. Goes when: the list is public.
def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """A pattern of the parameters that transformers keeps in float32 when asked for a type; None where it has none."""
    names: set[str] = set()
    if dtype in (torch.bfloat16, torch.float16):
        names.update(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names.update(model._keep_in_fp32_modules or ())
    return build_glob_alternation(sorted(names))[0] if names else None


# PRIVATE: `GradientCheckpointingLayer._gradient_checkpointing_func`, transformers 5.23 and 5.24.
# Why: checkpoints over several layers take the place of those of each layer, and how checkpoints were asked for is
# kept nowhere else. Goes when: transformers checkpoints several layers together, and says whether it is reentrant.
def checkpoint_function(module: nn.Module) -> Callable[..., Any] | None:
    """What a layer calls in place of its forward under gradient checkpointing; None where it has no such thing."""
    return getattr(module, "_gradient_checkpointing_func", None)


def set_checkpoint_function(layer: nn.Module, function: Callable[..., Any]) -> None:
    """Has a layer call this, with its forward and the arguments by position, under gradient checkpointing."""
    layer._gradient_checkpointing_func = function  # type: ignore[assignment]


# PRIVATE: `GradientCheckpointingLayer._can_checkpoint_with_cache`, transformers 5.23 and 5.24.
# Why: under gradient checkpointing a layer drops its cache, with a warning, as running it again would write again; one
# that is only read may stay. Goes when: the cache itself can say that it is only read.
@contextmanager
def keeping_cache_under_checkpointing(layers: Iterable[GradientCheckpointingLayer]) -> Iterator[None]:
    """Has decoder layers keep their cache under gradient checkpointing."""
    changed = list(layers)
    for layer in changed:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in changed:
            del layer._can_checkpoint_with_cache


# PRIVATE: functions of modeling files made by `use_kernel_func_from_hub_with_fallback` (known by the file of their
# code, with the reference as `__wrapped__`, and name and package of the kernel among what they close over),
# transformers 5.23 and 5.24.
# Why: flash-linear-attention, causal-conv1d and mamba-ssm are bound when a modeling file is imported, whatever device
# the tensors will be on and whether gradient is asked for. Goes when: transformers chooses at each call.
def replace_kernels(modeling_file: ModuleType, make: Callable[..., Callable[..., Any]]) -> None:
    """Puts `make(bound, reference, kernel, package)` in the place of every kernel function of a modeling file.

    Args:
        modeling_file: An imported module `modeling_*` of transformers.
        make: Gets what is bound, the PyTorch function it stands for, and the names of the kernel and of its package,
            such as `chunk_kda` and `fla`. The reference may have any name.
    """
    for name, function in list(vars(modeling_file).items()):
        if inspect.isfunction(function) and function.__code__.co_filename.endswith("hub_kernels.py"):
            reference = getattr(function, "__wrapped__", None)
            if reference is not None:
                enclosed = inspect.getclosurevars(function).nonlocals
                replaced = make(function, reference, enclosed["func_name"], enclosed["package"])
                setattr(modeling_file, name, replaced)
