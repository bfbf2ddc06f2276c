# SPDX-License-Identifier: Apache-2.0
"""Train how a model responds in long contexts, without the backward pass through them."""

from frozen_peft.adapters import lora_config, quantization_config
from frozen_peft.config import FrozenContextConfig
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.trainer import FrozenContextTrainer

__all__ = [
    "ContextMismatchError",
    "FrozenContextConfig",
    "FrozenContextTrainer",
    "UnsupportedArchitectureError",
    "lora_config",
    "quantization_config",
]
