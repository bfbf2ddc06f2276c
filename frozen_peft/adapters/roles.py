# SPDX-License-Identifier: Apache-2.0
"""Find which projections a model has, what role each plays, and in which of its rows."""

import copy
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from frozen_peft.adapters.role_table import ATTENTION_LEAVES, BYPASSED, LAYOUTS, MLP_LEAVES, Role, RowRanges
from frozen_peft.errors import UnsupportedArchitectureError
from frozen_peft.utils.compat.transformers import from_config

__all__ = [
    "LinearModule",
    "RoleMatch",
    "as_model",
    "bypassed_modules",
    "find_roles",
    "linear_modules",
    "model_on_meta",
    "named_class",
    "rows_of_roles",
    "target_pattern",
]

_IN_LAYER = re.compile(r"(?P<stack>[A-Za-z_]\w*)\.(?P<layer>\d+)\.(?P<path>.+)")

# Where the three classes of one checkpoint (text backbone, causal model, vision-language wrapper) keep the text
# model. A pattern that accepts all of them lets an adapter move between the classes.
_USUAL_PREFIXES = frozenset({"", "model", "model.language_model"})


@dataclass(frozen=True)
class LinearModule:
    """One linear module in a layer of the text model.

    Attributes:
        name: Full name in the model, without PEFT's wrapping.
        stack: Name of the list of layers it is in, relative to the text model (`"layers"`, `"h"`).
        layer: Index of its layer.
        path: Its name within the layer.
        module: The linear module itself, under any PEFT wrapper.
        in_features: Input features.
        out_features: Output features.
    """

    name: str
    stack: str
    layer: int
    path: str
    module: nn.Module
    in_features: int
    out_features: int


@dataclass(frozen=True)
class RoleMatch:
    """One role held by one linear module; a module that fuses several roles has one match for each.

    Attributes:
        module: Full name of the linear module in the model, without PEFT's wrapping.
        role: What these rows do.
        rows: Output features that hold the role, as half-open ranges; `None` if all do.
        layer: Index of its layer.
        path: Its name within the layer.
        out_features: Output features of the whole module.
    """

    module: str
    role: Role
    rows: RowRanges | None
    layer: int
    path: str
    out_features: int


def as_model(model_or_config: nn.Module | PretrainedConfig | str) -> nn.Module:
    """Return a model without PEFT's wrapping; from a configuration, one without weights (on the meta device).

    Args:
        model_or_config: A model, PEFT-wrapped or not, its configuration, or a hub id or path to load that from.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(model_or_config, PeftModel):
        return model_or_config.get_base_model()
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    if isinstance(model_or_config, str):
        model_or_config = AutoConfig.from_pretrained(model_or_config)
    if isinstance(model_or_config, PretrainedConfig):
        return model_on_meta(model_or_config)
    raise TypeError(
        "`model_or_config` must be a model, a transformers configuration, or a hub id or path; "
        f"got {type(model_or_config).__name__}."
    )


def named_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration names; None where it names none."""
    architectures = config.architectures
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, named, None) if isinstance(named, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def model_on_meta(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A model without weights: the class that its configuration names, else the automatic one.

    Args:
        config: The configuration.
        options: `dtype`, by default the configuration's, and `trust_remote_code`.

    Raises:
        ValueError: transformers has no class for it.
    """
    # Building a model writes to its configuration (dtype, attention implementation), which is the caller's.
    config = copy.deepcopy(config)
    # TRL loads the class a checkpoint names; the automatic class may be another one with other module names.
    named = named_class(config)
    with torch.device("meta"):
        if named is not None:
            return from_config(named, config, dtype=options.get("dtype", config.dtype))
        try:
            return AutoModelForCausalLM.from_config(config, **options)
        except ValueError:
            return AutoModelForImageTextToText.from_config(config, **options)


def _text_model(model: nn.Module) -> tuple[str, PreTrainedModel]:
    """Name (empty for the model itself) and module of the language model inside `model`."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"The model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder), decoder


def linear_modules(model: nn.Module) -> list[LinearModule]:
    """List the linear modules in the layers of the text model, in order.

    Vision and audio towers, embeddings and the output head are no part of it. A module that PEFT has wrapped is
    listed once, under its own name.

    Args:
        model: A transformers model; one that PEFT has adapted is given unwrapped (`as_model`).
    """
    prefix, text_model = _text_model(model)
    found = []
    inside_adapter: str | None = None
    for relative_name, module in text_model.named_modules():
        if inside_adapter is not None and relative_name.startswith(inside_adapter):
            continue
        if isinstance(module, BaseTunerLayer):
            inside_adapter = relative_name + "."
            module = module.get_base_layer()
        in_layer = _IN_LAYER.fullmatch(relative_name)
        if in_layer is None or not isinstance(module, nn.Linear | Conv1D):
            continue
        name = f"{prefix}.{relative_name}" if prefix else relative_name
        is_linear = isinstance(module, nn.Linear)
        sizes = (module.in_features, module.out_features) if is_linear else module.weight.shape
        found.append(LinearModule(name, in_layer["stack"], int(in_layer["layer"]), in_layer["path"], module, *sizes))
    return found


def bypassed_modules(model: nn.Module) -> list[str]:
    """Names of the linear modules whose weight a kernel reads without calling them: adapters there do nothing.

    Args:
        model: A transformers model without PEFT's wrapping.
    """
    paths = BYPASSED.get(_text_model(model)[1].config.model_type, frozenset())
    return [linear.name for linear in linear_modules(model) if linear.path in paths]


def find_roles(model_or_config: nn.Module | PretrainedConfig | str) -> list[RoleMatch]:
    """List every role of every projection in the text model, in the order of its modules.

    Architectures of the role table are known projection by projection; any other is understood if it has
    `q_proj`, `k_proj`, `v_proj` and `o_proj`. Projections that cannot be adapted (`out_proj` of Mamba mixers,
    whose weight the kernel reads directly) are left out. `mlp` covers `nn.Linear` MLPs and shared experts, not
    routers nor the routed experts, which are stacked parameters.

    Args:
        model_or_config: A model, PEFT-wrapped or not, its configuration (the model is then built without
            weights), or a hub id or path to load that from.

    Raises:
        UnsupportedArchitectureError: The architecture has no known roles; the message lists its linear modules.
    """
    model = as_model(model_or_config)
    model_type = _text_model(model)[1].config.model_type
    linears = linear_modules(model)
    layouts = LAYOUTS.get(model_type)
    if layouts is None:
        if not set(ATTENTION_LEAVES) <= {linear.path.rpartition(".")[2] for linear in linears}:
            raise UnsupportedArchitectureError(_unsupported(model_type, linears))
        layouts = {}
    skipped = BYPASSED.get(model_type, frozenset())
    matches = []
    for linear in linears:
        if linear.path in skipped:
            continue
        owner_path, _, leaf = linear.path.rpartition(".")
        if linear.path in layouts:
            layer_name = linear.name.removesuffix(f".{linear.path}")
            roles = layouts[linear.path](model.get_submodule(f"{layer_name}.{owner_path}"))
        elif leaf in ATTENTION_LEAVES:
            roles = {ATTENTION_LEAVES[leaf]: None}
        elif leaf in MLP_LEAVES:
            roles = {"mlp": None}
        else:
            continue
        matches += [
            RoleMatch(linear.name, role, rows, linear.layer, linear.path, linear.out_features)
            for role, rows in roles.items()
        ]
    return matches


def _unsupported(model_type: str, linears: Iterable[LinearModule]) -> str:
    paths = dict.fromkeys(f"{linear.stack}.*.{linear.path}" for linear in linears)
    return (
        f"No roles are known for the architecture {model_type!r}: it is not in the role table and its layers lack "
        f"{', '.join(ATTENTION_LEAVES)}. Linear modules found: {', '.join(paths) or 'none'}. Use "
        "preset='all-linear', or name the modules you want in a peft.LoraConfig."
    )


def rows_of_roles(matches: Iterable[RoleMatch], roles: Collection[str]) -> torch.Tensor:
    """Mark the rows of one module that hold at least one of `roles`.

    Args:
        matches: All matches of one module; at least one.
        roles: The roles asked for.

    Returns:
        bool[out_features], on the CPU.
    """
    matches = list(matches)
    marked = torch.zeros(matches[0].out_features, dtype=torch.bool, device="cpu")
    for match in matches:
        if match.role in roles:
            for start, stop in match.rows or ((0, match.out_features),):
                marked[start:stop] = True
    return marked


def target_pattern(model: nn.Module, names: Collection[str]) -> str:
    """Write the regular expression that matches exactly these linear modules of the text model.

    Layer numbers are spelled out only where a name is meant in some layers and not in others, and the pattern
    fits the text-only and the vision-language class of a checkpoint alike.

    Args:
        model: A transformers model without PEFT's wrapping.
        names: Full names of linear modules of the text model; at least one.
    """
    prefix = _text_model(model)[0]
    linears = linear_modules(model)
    by_layers: dict[tuple[str, str], list[str]] = {}
    for key in dict.fromkeys((linear.stack, linear.path) for linear in linears):
        alike = [linear for linear in linears if (linear.stack, linear.path) == key]
        wanted = [str(linear.layer) for linear in alike if linear.name in names]
        if wanted:
            layers = r"\d+" if len(wanted) == len(alike) else f"(?:{'|'.join(wanted)})"
            by_layers.setdefault((key[0], layers), []).append(re.escape(key[1]))
    alternatives = [
        rf"{re.escape(stack)}\.{layers}\.(?:{'|'.join(paths)})" for (stack, layers), paths in by_layers.items()
    ]
    if prefix in _USUAL_PREFIXES:
        root = r"(?:model\.)?(?:language_model\.)?"
    else:
        root = re.escape(f"{prefix}.")
    return f"{root}(?:{'|'.join(alternatives)})"
