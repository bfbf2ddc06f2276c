# SPDX-License-Identifier: Apache-2.0
"""Train how a model responds in long contexts, without the backward pass through them."""

from typing import TYPE_CHECKING

from frozen_peft.utils.lazy import lazy_package
from frozen_peft.utils.noise import silence_logs
from frozen_peft.utils.versions import warn_of_untested_versions

if TYPE_CHECKING:
    from frozen_peft.adapters import lora_config, quantization_config
    from frozen_peft.config import FrozenContextConfig
    from frozen_peft.data import load_samples
    from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
    from frozen_peft.gradient import gradient_flow
    from frozen_peft.merging import merge_adapter
    from frozen_peft.training.dpo import FrozenContextDPOConfig, FrozenContextDPOTrainer
    from frozen_peft.training.kto import FrozenContextKTOConfig, FrozenContextKTOTrainer
    from frozen_peft.training.sft import FrozenContextTrainer

__all__ = [
    "ContextMismatchError",
    "FrozenContextConfig",
    "FrozenContextDPOConfig",
    "FrozenContextDPOTrainer",
    "FrozenContextKTOConfig",
    "FrozenContextKTOTrainer",
    "FrozenContextTrainer",
    "UnsupportedArchitectureError",
    "gradient_flow",
    "load_samples",
    "lora_config",
    "merge_adapter",
    "quantization_config",
]

silence_logs()

# TRL and transformers take seconds to import, which `frozen-peft --help` need not wait for.
_MODULES, _, __getattr__, __dir__ = lazy_package(
    __name__,
    {
        "adapters": ["lora_config", "quantization_config"],
        "config": ["FrozenContextConfig"],
        "data": ["load_samples"],
        "errors": ["ContextMismatchError", "UnsupportedArchitectureError"],
        "gradient": ["gradient_flow"],
        "merging": ["merge_adapter"],
        "training.dpo": ["FrozenContextDPOConfig", "FrozenContextDPOTrainer"],
        "training.kto": ["FrozenContextKTOConfig", "FrozenContextKTOTrainer"],
        "training.sft": ["FrozenContextTrainer"],
    },
)

warn_of_untested_versions()
