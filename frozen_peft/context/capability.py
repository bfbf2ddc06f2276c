# SPDX-License-Identifier: Apache-2.0
"""Chooses how a model's attention reads a frozen context."""

import logging

import torch

from frozen_peft.context.decision import decision_forward
from frozen_peft.context.dropout import attention_dropout
from frozen_peft.context.encoder import encode_context
from frozen_peft.context.latents import hand_on_latents
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.modes import attention_in_training
from frozen_peft.context.segments import IMPLEMENTATION, is_segmented
from frozen_peft.errors import ContextMismatchError
from frozen_peft.utils.cache_argument import as_cache_argument
from frozen_peft.utils.compat.transformers import attention_implementation

__all__ = ["reason_against_segments", "use_segmented_attention"]

logger = logging.getLogger(__name__)

# Layer types of `config.layer_types` whose masks are causal, causal in a window, or none at all.
SEGMENTED_LAYER_TYPES = {
    "full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding", "mlp", "moe",
}  # fmt: skip


def use_segmented_attention(model: torch.nn.Module) -> bool:
    """Switches a model from SDPA to attention over two segments, where that is exact.

    The switch stays for the model's life, since the backward pass may run layers again; forwards without a frozen
    context go to SDPA as before. A model that keeps its own attention concatenates context and decision instead,
    which is as exact and costs a copy of each layer's keys and values.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.

    Returns:
        Whether the model's attention reads two segments now.
    """
    pretrained = get_pretrained_model(model)
    if is_segmented(pretrained):
        return True
    decoder = get_decoder(pretrained)
    reason = reason_against_segments(pretrained)
    if reason is None:
        decoder.set_attn_implementation(IMPLEMENTATION)
        hand_on_latents(decoder)
        try:
            _probe(model)
        except ContextMismatchError as error:
            decoder.set_attn_implementation("sdpa")
            reason = f"a trial failed ({str(error).partition('. ')[0]})"
    if reason is not None:
        logger.info(
            "%s keeps its own attention, because %s. Each layer copies the context's keys and values while it runs.",
            type(pretrained).__name__,
            reason,
        )
    return reason is None


def reason_against_segments(model: torch.nn.Module) -> str | None:
    """Why a model keeps its own attention, as far as its configuration tells; None: nothing speaks against it."""
    config = get_decoder(model).config
    implementation = attention_implementation(config)
    if implementation != "sdpa":
        return f"it was loaded with attn_implementation={implementation!r} and not 'sdpa'"
    if (dropout := attention_dropout(config)) is not None:
        return dropout
    unknown = set(getattr(config, "layer_types", None) or ()) - SEGMENTED_LAYER_TYPES
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    return None


@torch.no_grad()
def _probe(model: torch.nn.Module) -> None:
    """Runs a decision of two tokens over one of two, as in training: what attention cannot read is an error."""
    pretrained = get_pretrained_model(model)
    decoder, device = get_decoder(pretrained), pretrained.get_input_embeddings().weight.device
    tokens = torch.zeros(2, dtype=torch.long, device=device)
    frozen = encode_context(model, [tokens], chunk_size=1)
    with attention_in_training(model), decision_forward(model):
        decoder(
            input_ids=tokens[None],
            position_ids=torch.tensor([[2, 3]], device=device),
            **as_cache_argument(decoder, frozen),
            use_cache=False,
        )
