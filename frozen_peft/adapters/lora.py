# SPDX-License-Identifier: Apache-2.0
"""LoRA on roles: which modules a preset adapts, as an ordinary PEFT configuration."""

import difflib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftConfig
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from frozen_peft.adapters.role_table import ROLES
from frozen_peft.adapters.roles import (
    RoleMatch,
    as_model,
    bypassed_modules,
    find_roles,
    linear_modules,
    rows_of_roles,
    target_pattern,
)
from frozen_peft.utils.compat.peft import unredirected_modules

__all__ = [
    "PRESETS",
    "RoleLoraConfig",
    "check_partial",
    "is_lora",
    "lora_config",
    "matches_by_module",
    "partial_problem",
]

logger = logging.getLogger(__name__)

_RESPONSE = ("query", "output", "gate", "beta", "decay", "gdn_output")
PRESETS: dict[str, tuple[str, ...] | None] = {
    "response": _RESPONSE,
    "response+mlp": (*_RESPONSE, "mlp"),
    "all-linear": None,
}
"""Roles of each preset; `None` means every linear module of the text model, role or not."""

# With these, and only these, PEFT starts `lora_B` at exactly zero and leaves the base weight alone.
_ZERO_B_INITIALISATIONS = (True, "gaussian")
# LoRA variants and extra parameters that change rows of a module's output other than through `lora_B`'s rows.
_BREAKS_PARTIAL = {
    "use_dora": "DoRA rescales every row of the module",
    "lora_bias": "the bias of lora_B has an entry for every row of the module",
    "use_qalora": "QALoRA changes what lora_A reads for all rows",
    "use_bdlora": "block-diagonal LoRA splits the rows its own way",
    "arrow_config": "Arrow mixes this adapter with others that adapt all rows",
    "monteclora_config": "MonteCLoRA adds noise to the update",
    "velora_config": "VeLoRA replaces the gradient the row restriction works on",
    "kasa_config": "KaSA changes the base weight",
    "layer_replication": "replicated layers no longer have the names the roles were found under",
}


def is_lora(config: PeftConfig) -> bool:
    """Whether an adapter is LoRA. AdaLoRA is not: its configuration derives from LoRA's, its layers are others."""
    return isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig)


@dataclass
class RoleLoraConfig(LoraConfig):
    """A `LoraConfig` that remembers the roles it was made for.

    Saved with the adapter as a field of `adapter_config.json`. Plain PEFT loads such an adapter, warns that it
    does not know `roles` and ignores it; `restrict_adapter_rows` then reads the adapted rows off the weights.
    """

    roles: list[str] | None = field(
        default=None,
        metadata={"help": "Roles that are adapted; `None`: every row of every target module."},
    )

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "RoleLoraConfig":
        """Build from the fields of a saved configuration, keeping `roles`, which PEFT's own method drops."""
        roles = kwargs.pop("roles", None)
        plain = super().from_peft_type(**kwargs)
        return cls(**{item.name: getattr(plain, item.name) for item in fields(plain) if item.init}, roles=roles)


def lora_config(
    model_or_config: nn.Module | PretrainedConfig | str,
    preset: str = "response",
    roles: Sequence[str] | None = None,
    **lora_kwargs: Any,
) -> LoraConfig:
    """Make the LoRA configuration that adapts a preset or a choice of roles.

    Only the text model is adapted, never a vision tower nor the output head. Where an architecture fuses several
    roles into one matrix and only some are asked for, the module is a target and its other rows are kept at
    exactly zero by `restrict_adapter_rows`, which has to be called once the model is wrapped by PEFT (the trainer
    does). Modules that PEFT cannot adapt are left out, and the log says so.

    Args:
        model_or_config: The model, its configuration, or a hub id or path to load the configuration from.
        preset: `"response"` (query, output, gate, beta, decay, gdn_output), `"response+mlp"`, or `"all-linear"`:
            every linear module of the text model, which needs no role table.
        roles: Roles to adapt instead of those of the preset.
        lora_kwargs: Fields of `peft.LoraConfig`. Defaults here: r=16, lora_alpha=32, lora_dropout=0,
            task_type="CAUSAL_LM".

    Raises:
        UnsupportedArchitectureError: The architecture has no known roles.
        ValueError: An unknown preset or role, nothing to adapt, `target_modules` among `lora_kwargs`, or a kind
            of LoRA that cannot leave part of a fused projection alone.
    """
    wanted = _wanted_roles(preset, roles)
    if "target_modules" in lora_kwargs:
        raise ValueError(
            f"`target_modules` follows from `preset` or `roles`; got {lora_kwargs['target_modules']!r} as well. "
            "Build a peft.LoraConfig to name modules yourself."
        )
    model = as_model(model_or_config)
    asked_for = f"preset={preset!r}" if roles is None else f"roles={list(roles)}"
    bypassed = bypassed_modules(model)
    if wanted is None:
        names = [linear.name for linear in linear_modules(model) if linear.name not in bypassed]
        grouped: dict[str, list[RoleMatch]] = {}
    else:
        matches = find_roles(model)
        grouped = {
            name: own for name, own in matches_by_module(matches).items() if any(match.role in wanted for match in own)
        }
        names = list(grouped)
        present = {match.role for match in matches}
        absent = [role for role in wanted if role not in present]
        if not names:
            raise ValueError(
                f"{asked_for} matches nothing in this model; the roles it has are "
                f"{[role for role in ROLES if role in present]}."
            )
        if roles is not None and absent:
            logger.warning("This model has no projection with the roles %s; they are ignored.", absent)
    if bypassed and (wanted is None or "gdn_output" in wanted):
        logger.info(
            "Not adapted: %s (%d modules). The kernel reads these weights without calling the module.",
            bypassed[0],
            len(bypassed),
        )
    names = _without_redirected(model, names)
    if not names:
        raise ValueError(f"{asked_for} matches no linear module that PEFT can adapt in this model.")

    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"} | lora_kwargs
    chosen = [linear.module for linear in linear_modules(model) if linear.name in set(names)]
    if all(isinstance(module, Conv1D) for module in chosen):
        settings.setdefault("fan_in_fan_out", True)
    config = RoleLoraConfig(
        target_modules=target_pattern(model, names),
        roles=None if wanted is None else list(wanted),
        **settings,
    )
    if wanted is not None:
        partial = [name for name in names if not bool(rows_of_roles(grouped[name], wanted).all())]
        if partial:
            check_partial(config, partial)
    return config


def matches_by_module(matches: Iterable[RoleMatch]) -> dict[str, list[RoleMatch]]:
    """Group matches by the module they are in, in order."""
    grouped: dict[str, list[RoleMatch]] = {}
    for match in matches:
        grouped.setdefault(match.module, []).append(match)
    return grouped


def _wanted_roles(preset: str, roles: Sequence[str] | None) -> tuple[str, ...] | None:
    if roles is None:
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {list(PRESETS)}, got {preset!r}.{_hint(preset, PRESETS)}")
        return PRESETS[preset]
    if isinstance(roles, str) or not roles:
        raise ValueError(f"`roles` must be a list of at least one of {list(ROLES)}, got {roles!r}.")
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"`roles` must be taken from {list(ROLES)}, got {role!r}.{_hint(role, ROLES)}")
    return tuple(role for role in ROLES if role in roles)


def _hint(received: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(received, known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _without_redirected(model: nn.Module, names: list[str]) -> list[str]:
    """Drop the modules that PEFT would turn into adapters of the routed experts."""
    kept = unredirected_modules(model, names)
    redirected = [name for name in names if name not in kept]
    if redirected:
        logger.warning(
            "Not adapted: %s and %d more. PEFT would adapt the stacked routed experts in place of these modules.",
            redirected[0],
            len(redirected) - 1,
        )
    return kept


def partial_problem(config: LoraConfig) -> str | None:
    """Say which setting cannot leave part of a fused projection exactly as it is, and why; `None` if all can."""
    for name, reason in _BREAKS_PARTIAL.items():
        if getattr(config, name):
            return f"`{name}`={getattr(config, name)!r}: {reason}"
    if config.init_lora_weights not in _ZERO_B_INITIALISATIONS:
        return (
            f"`init_lora_weights`={config.init_lora_weights!r}: lora_B has to start at zero and the base weight "
            f"to stay as it is, which holds for {' and '.join(map(repr, _ZERO_B_INITIALISATIONS))}"
        )
    if config.bias != "none":
        return f"`bias`={config.bias!r}: it trains the bias of every row"
    return None


def check_partial(config: LoraConfig, modules: Sequence[str]) -> None:
    """Refuse settings with which part of a fused projection cannot be left exactly as it is.

    Args:
        config: The adapter's configuration.
        modules: Modules of which only some rows are to be adapted; at least one.

    Raises:
        ValueError: Such a setting is on.
    """
    problem = partial_problem(config)
    if problem is not None:
        raise ValueError(
            f"Only some rows of {modules[0]} ({len(modules)} such modules) are to be adapted, which is not possible "
            f"with {problem}. Turn it off, or adapt whole modules: choose `roles` that cover them, or "
            "preset='all-linear'."
        )
