# SPDX-License-Identifier: Apache-2.0
"""Roles of projections per architecture, LoRA presets on them, and the 4-bit base."""

from frozen_peft.adapters.activated import (
    activate_at_invocation,
    active_everywhere,
    find_invocation,
    require_always_active,
)
from frozen_peft.adapters.adapted_rows import adapted_projections, restrict_adapter_rows
from frozen_peft.adapters.initialisation import BaseSamples, change_of_base, require_base
from frozen_peft.adapters.lora import PRESETS, RoleLoraConfig, is_lora, lora_config
from frozen_peft.adapters.pickles import require_no_pickle
from frozen_peft.adapters.quantization import keep_linear4bit_trainable, quantization_config
from frozen_peft.adapters.role_table import ROLES
from frozen_peft.adapters.roles import find_roles
from frozen_peft.adapters.tokenizers import load_tokenizer, require_embeddings
from frozen_peft.adapters.vocabulary import resize_vocabulary, without_copies

__all__ = [
    "PRESETS",
    "ROLES",
    "BaseSamples",
    "RoleLoraConfig",
    "activate_at_invocation",
    "active_everywhere",
    "adapted_projections",
    "change_of_base",
    "find_invocation",
    "find_roles",
    "is_lora",
    "keep_linear4bit_trainable",
    "load_tokenizer",
    "lora_config",
    "quantization_config",
    "require_always_active",
    "require_base",
    "require_embeddings",
    "require_no_pickle",
    "resize_vocabulary",
    "restrict_adapter_rows",
    "without_copies",
]
