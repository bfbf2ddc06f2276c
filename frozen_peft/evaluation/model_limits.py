# SPDX-License-Identifier: Apache-2.0
"""What a model must be to decide over frozen contexts, and how far it reaches."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

__all__ = ["num_positions", "require_adapters_on_weights"]


def require_adapters_on_weights(model: torch.nn.Module) -> None:
    """Refuses adapters that stand before a context, which would be left out where contexts are encoded below them.

    Raises:
        ValueError: An active adapter is no change of weights.
    """
    if not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning:
            raise ValueError(
                f"Adapter `{name}` is a {type(config).__name__}, which puts tokens of its own before a context; only "
                "adapters on weights (LoRA and its kin) can be sampled with or scored over frozen contexts."
            )


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model has positions for; None where there is no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
