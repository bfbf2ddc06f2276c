# SPDX-License-Identifier: Apache-2.0
"""What accelerate does not offer: which models it has prepared, and to forget one."""

from typing import Any

import torch
from accelerate import Accelerator

__all__ = ["forget_preparation", "prepared_models"]


# PRIVATE: `Accelerator._models`, accelerate 1.15.
# Why: whether a model has been prepared is kept nowhere else. Goes when: accelerate says it.
def prepared_models(accelerator: Accelerator) -> list[Any]:
    """Models that were prepared for training or evaluation."""
    models: list[Any] = accelerator._models
    return models


# PRIVATE: `model._is_accelerate_prepared`, accelerate 1.15.
# Why: transformers 5.23 has it prepare a model for an evaluation alone, which marks it as prepared. Training would
# take it as it is, without DDP, and each process follow its own gradients without a word.
# Goes when: accelerate marks what it prepared in evaluation mode otherwise, or transformers prepares it for training.
def forget_preparation(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Lets training prepare a model that was evaluated before."""
    if accelerator.num_processes > 1 and vars(model).pop("_is_accelerate_prepared", False):
        accelerator._models.clear()
