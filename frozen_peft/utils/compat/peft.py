# SPDX-License-Identifier: Apache-2.0
"""What of PEFT is used beyond what it promises."""

from collections.abc import Sequence

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

__all__ = ["ALoraLinearVariant", "is_dora", "set_variant", "unredirected_modules", "variant_name"]


# PRIVATE: `LoraLayer.lora_variant` and `peft.tuners.lora.variants`, peft 0.21.
# Why: an adapter that tokens switch on has to run as plain LoRA over a decision, and only a variant of its own can.
# Goes when: PEFT's activated LoRA can be told that all tokens see the adapter.
def set_variant(layer: LoraLayer, adapter: str, variant: ALoraLinearVariant) -> None:
    """Has an adapter on one layer run by a variant of LoRA."""
    layer.lora_variant[adapter] = variant


def variant_name(layer: LoraLayer, adapter: str) -> str | None:
    """The class of the variant of LoRA that an adapter on one layer is; None where it is plain LoRA."""
    variant = layer.lora_variant.get(adapter)
    return None if variant is None else type(variant).__name__


def is_dora(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter on one layer is DoRA as a linear module has it."""
    return isinstance(layer.lora_variant.get(adapter), DoraLinearVariant)


# PRIVATE: `peft.utils.transformers_weight_conversion`, peft 0.21.
# Why: for checkpoints whose experts transformers 5 stacks (Qwen3-Next, GLM-4-MoE, Qwen3-MoE and others), PEFT reads
# `gate_proj`, `up_proj` and `down_proj` among the targets as the experts of transformers 4 and adapts the stacked
# parameters instead, the shared expert and dense MLPs not at all. There is no way around it by name. Goes when: PEFT
# tells full names apart.
def unredirected_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The linear modules that PEFT adapts when they are named, and not the stacked experts in their place."""
    probe = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(probe, model=model, conversions=None)
    return [name for name in names if name in probe.target_modules]
