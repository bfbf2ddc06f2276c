# SPDX-License-Identifier: Apache-2.0
"""Adapters that begin by changing the base, so that the model with its adapters off is not the base model.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part out of the base's weights and put it into the adapter, which then
starts at something else than zero; KaSA takes one out for good. With the adapter on, the model is the base as before
(KaSA: nearly). With it off, or with any other adapter, it is what was left of the base.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["CONVERT", "BaseSamples", "change_of_base", "initial_change", "require_base", "spread_values"]

# Initialisations of LoRA that leave the base's weights as they are (peft 0.21).
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Values that are compared of each weight that an adapter is put on.
NUM_VALUES = 64

CONVERT = (
    "Save it as an adapter of the base itself (PEFT's `save_pretrained` with "
    "`path_initial_model_for_weight_conversion`), or merge it in PEFT where it was trained (`merge_and_unload`)."
)


def initial_change(config: Any) -> str | None:
    """The field of an adapter's configuration by which it has changed the base's weights, with its value.

    Args:
        config: PEFT's, or one read from a folder.

    Returns:
        None where it leaves them as they are.
    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    if values.get("kasa_config"):
        return f"kasa_config={values['kasa_config']!r}"
    initialisation = values.get("init_lora_weights", True)
    if isinstance(initialisation, str):
        initialisation = initialisation.lower()
    if not any(initialisation is known or initialisation == known for known in KEEPS_BASE):
        return f"init_lora_weights={initialisation!r}"
    return None


def change_of_base(model: nn.Module | Mapping[str, PeftConfig]) -> str | None:
    """Why a model with its adapters off is not the base model; None where it is.

    Weights that are trained besides adapters are not looked at.

    Args:
        model: A model; or configurations of the adapters that it will be given, by their names.
    """
    configs = model if isinstance(model, Mapping) else model.peft_config if isinstance(model, PeftModel) else {}
    for name, config in configs.items():
        # Active or not: what it has changed stays changed.
        if change := initial_change(config):
            return f"adapter `{name}` has changed the weights of the base before training (`{change}`)"
        bias = getattr(config, "bias", "none")
        if bias != "none" and isinstance(model, PeftModel) and _has_biases(model, only_adapted=bias != "all"):
            return f"adapter `{name}` has biases of its own in place of the base's (`bias={bias!r}`)"
    return None


def require_base(model: nn.Module | Mapping[str, PeftConfig], needed_for: str) -> None:
    """Refuses to take a model with its adapters off for the base model, where it is not.

    Args:
        model: A model; or configurations of the adapters that it will be given, by their names.
        needed_for: What has the base for what, the subject and verb of a sentence.

    Raises:
        ValueError: It is another model.
    """
    if change := change_of_base(model):
        raise _no_base(change, needed_for)


class BaseSamples:
    """A few values of the weights of a model's modules, to see whether adapters have changed them.

    Args:
        model: The model without adapters, which PEFT puts them into.
    """

    def __init__(self, model: nn.Module):
        self._taken = {
            id(module): (module, spread_values(weight, NUM_VALUES)[1])
            for module in model.modules()
            if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        }

    def require_kept(self, model: nn.Module, needed_for: str) -> None:
        """Refuses a model whose adapters have changed what they are put on, whatever their configuration calls it.

        Args:
            model: The same model with adapters.
            needed_for: See `require_base`.

        Raises:
            ValueError: A weight is another one.
        """
        for name, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer) or id(base := layer.get_base_layer()) not in self._taken:
                continue
            assert isinstance(base.weight, torch.Tensor)
            before, now = self._taken[id(base)][1], spread_values(base.weight, NUM_VALUES)[1]
            if before.shape == now.shape and not torch.equal(before, now):
                raise _no_base(f"an adapter has changed the base's weight in `{name}`", needed_for)


def _no_base(change: str, needed_for: str) -> ValueError:
    return ValueError(
        f"{needed_for}, and with its adapters off this model is not its base: {change}. Use an initialisation that "
        f"leaves the base as it is ({', '.join(map(repr, KEEPS_BASE))}; `bias='none'`). Of an adapter that is trained "
        f"already: {CONVERT[0].lower()}{CONVERT[1:]}"
    )


def _has_biases(model: PeftModel, *, only_adapted: bool) -> bool:
    """Whether the base has biases that an adapter's configuration makes its own."""
    own = model.base_model.prefix
    names = (name for name, _ in model.get_base_model().named_parameters() if "bias" in name and own not in name)
    return any(not only_adapted or name.endswith(".base_layer.bias") for name in names)


def spread_values(weight: torch.Tensor, num_values: int) -> tuple[list[int], torch.Tensor]:
    """Flat indices spread over a weight, and what is there in float32: of a quantized one codes, of an empty one none.

    Args:
        weight: The weight.
        num_values: How many; all where there are fewer.
    """
    flat = weight.detach().reshape(-1)
    num_values = min(num_values, flat.numel())
    indices = [(2 * part + 1) * flat.numel() // (2 * num_values) for part in range(num_values)]
    return indices, flat[torch.tensor(indices, dtype=torch.long, device=flat.device)].float().cpu()
