# SPDX-License-Identifier: Apache-2.0
"""Train how a model responds in long contexts, without the backward pass through them."""

from .adapters import lora_config, quantization_config
from .config import FrozenContextConfig
from .errors import ContextMismatchError, UnsupportedArchitectureError
from .trainer import FrozenContextTrainer

__all__ = [
    "ContextMismatchError",
    "FrozenContextConfig",
    "FrozenContextTrainer",
    "UnsupportedArchitectureError",
    "lora_config",
    "quantization_config",
]
