# SPDX-License-Identifier: Apache-2.0
"""Train how a model responds in long contexts, without the backward pass through them."""

import importlib
from typing import TYPE_CHECKING, Any

from frozen_peft.utils.noise import silence_logs
from frozen_peft.utils.versions import warn_of_untested_versions

if TYPE_CHECKING:
    from frozen_peft.adapters import lora_config, quantization_config
    from frozen_peft.config import FrozenContextConfig
    from frozen_peft.data import load_samples
    from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
    from frozen_peft.gradient import gradient_flow
    from frozen_peft.merging import merge_adapter
    from frozen_peft.training.sft import FrozenContextTrainer

__all__ = [
    "ContextMismatchError",
    "FrozenContextConfig",
    "FrozenContextTrainer",
    "UnsupportedArchitectureError",
    "gradient_flow",
    "load_samples",
    "lora_config",
    "merge_adapter",
    "quantization_config",
]

silence_logs()

# Imported at first use: TRL and transformers take seconds to import, which `frozen-peft --help` need not wait for.
_MODULES = {
    "ContextMismatchError": "errors",
    "FrozenContextConfig": "config",
    "FrozenContextTrainer": "training.sft",
    "UnsupportedArchitectureError": "errors",
    "gradient_flow": "gradient",
    "load_samples": "data",
    "lora_config": "adapters",
    "merge_adapter": "merging",
    "quantization_config": "adapters",
}


warn_of_untested_versions()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
