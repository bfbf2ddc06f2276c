# SPDX-License-Identifier: Apache-2.0
"""Adapt part of a fused projection: rows of `lora_B` that stay exactly zero.

The update of a module is `scaling * lora_B @ lora_A`, and row i of it depends on row i of `lora_B` alone. PEFT starts
`lora_B` at zero, so a row that never moves adds nothing, neither to the forward nor to a merged weight:

1. A hook on `lora_B.weight` zeroes the gradient of the rows that are not adapted, before any optimizer sees it.
2. An optimizer that works by gradients then leaves such a row at zero: its moments are zero, and weight decay
   scales a zero.
3. Saving, loading and merging treat `lora_B` as the ordinary matrix that it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from frozen_peft.adapters.lora import RoleLoraConfig, check_partial, is_lora, matches_by_module, partial_problem
from frozen_peft.adapters.role_table import ROLES
from frozen_peft.adapters.roles import RoleMatch, find_roles, linear_modules, rows_of_roles
from frozen_peft.errors import UnsupportedArchitectureError

__all__ = ["AdaptedProjection", "adapted_projections", "restrict_adapter_rows"]

# Installed hooks by parameter, which a second call replaces. Weak, so that it keeps no weight alive; not on the
# parameter itself, where it would be saved with it.
_installed: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class AdaptedProjection:
    """One adapter on one linear module.

    Attributes:
        module: Full name of the module, without PEFT's wrapping.
        index: Index of its layer in the model.
        name: Name of the adapter.
        layer: PEFT's layer.
        matches: Roles of the module, none if it has no role.
        adapted: bool[out_features], the rows that are adapted.
    """

    module: str
    index: int
    name: str
    layer: LoraLayer
    matches: list[RoleMatch]
    adapted: torch.Tensor

    @property
    def weight(self) -> nn.Parameter:
        """`lora_B`, [out_features, r]."""
        return self.layer.lora_B[self.name].weight


def restrict_adapter_rows(model: nn.Module) -> list[str]:
    """Keep the rows of fused projections that are not to be adapted at exactly zero; call it after PEFT wrapping.

    Which rows those are follows from the `roles` of the adapter's configuration. An adapter whose configuration
    has none (loaded by plain PEFT, which drops the field) is read instead: where some of the roles fused into a
    module have only zeros in `lora_B` and others do not, the former were not adapted. Calling it again changes
    nothing; call it again after anything that replaces parameters. A model without LoRA is left alone.

    Args:
        model: The model as wrapped by PEFT.

    Returns:
        Names of the modules of which only some rows are adapted.

    Raises:
        ValueError: Rows that are not to be adapted are not zero, or the adapter is of a kind that has no rows of
            its own (see `lora_config`).
    """
    restricted = []
    for adapter in adapted_projections(model):
        weight, frozen = adapter.weight, ~adapter.adapted
        if (previous := _installed.pop(weight, None)) is not None:
            previous.remove()
        if not frozen.any():
            continue
        assert isinstance(model, PeftModel)
        check_partial(model.peft_config[adapter.name], [adapter.module])
        if weight.device.type != "meta" and bool(weight.detach()[frozen.to(weight.device)].any()):
            raise ValueError(
                f"Adapter {adapter.name!r} of {adapter.module} already changes rows that its `roles` "
                f"({model.peft_config[adapter.name].roles}) leave out. Load it with the roles it was trained with."
            )
        # A parameter that is not trainable (an adapter loaded for inference) takes no hook until it is.
        trainable = weight.requires_grad
        _installed[weight] = weight.requires_grad_(True).register_hook(_zeroing(frozen))
        weight.requires_grad_(trainable)
        restricted.append(adapter.module)
    return restricted


def _zeroing(frozen: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that zeroes rows of a gradient; which rows is moved once to where gradients are."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal frozen
        frozen = frozen.to(gradient.device)
        return gradient.masked_fill(frozen[:, None], 0.0)

    return hook


def adapted_projections(model: nn.Module) -> list[AdaptedProjection]:
    """Every LoRA adapter on a linear module of the text model, with the rows it adapts."""
    if not isinstance(model, PeftModel):
        return []
    configs = {name: config for name, config in model.peft_config.items() if is_lora(config)}
    base = model.get_base_model()
    try:
        grouped = matches_by_module(find_roles(base))
    except UnsupportedArchitectureError:
        if any(getattr(config, "roles", None) for config in configs.values()):
            raise
        grouped = {}
    found = []
    for linear in linear_modules(base):
        layer = base.get_submodule(linear.name)
        if not isinstance(layer, LoraLayer):
            continue
        matches = grouped.get(linear.name, [])
        for name, config in configs.items():
            if name in layer.lora_B:
                weight = layer.lora_B[name].weight
                adapted = _adapted_rows(config, matches, weight)
                found.append(AdaptedProjection(linear.name, linear.layer, name, layer, matches, adapted))
    return found


def _adapted_rows(config: LoraConfig, matches: list[RoleMatch], weight: torch.Tensor) -> torch.Tensor:
    """bool[out_features]: the rows of one module that its adapter changes."""
    everything = torch.ones(weight.shape[0], dtype=torch.bool, device="cpu")
    if all(match.rows is None for match in matches):
        return everything
    if isinstance(config, RoleLoraConfig):
        return everything if config.roles is None else rows_of_roles(matches, config.roles)
    # DoRA and its like change every row, whatever `lora_B` holds; weights on the meta device hold nothing to read.
    if weight.device.type == "meta" or partial_problem(config) is not None:
        return everything
    changed = weight.detach().ne(0).any(dim=1).cpu()
    # Rows by the set of roles they serve (a latent of keys and values serves two), written as a binary number.
    code = torch.zeros(weight.shape[0], dtype=torch.long, device="cpu")
    for match in matches:
        code += rows_of_roles([match], [match.role]).long() << ROLES.index(match.role)
    adapted = torch.zeros_like(everything)
    for group in code.unique():
        rows = code == group
        if changed[rows].any():
            adapted |= rows
    # An adapter that has not been trained yet tells nothing: all of it may move.
    return adapted if adapted.any() else everything
