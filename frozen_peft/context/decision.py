# SPDX-License-Identifier: Apache-2.0
"""The forward of decisions over a frozen context."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.context.boundary import MIN_DECISION_TOKENS
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.handover import SegmentedForward, frozen_length, segmented_forward
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.segments import is_segmented
from frozen_peft.errors import ContextMismatchError

__all__ = ["decision_forward"]

# Modules that expand cached latents into keys and values (multi-head latent attention) in each forward, context
# positions included.
LATENT_EXPANSIONS = ("kv_b_proj",)


@contextmanager
def decision_forward(model: torch.nn.Module) -> Iterator[None]:
    """Lets `model(..., past_key_values=frozen_context)` run forward, to be followed by an ordinary backward.

    Inside, the model takes decisions padded on the right: `input_ids`, `attention_mask` and `position_ids` of shape
    `(B, D)` with D of 2 or more, positions counted from the start of each context. Forwards without a frozen context
    are not affected. The backward pass may run outside.

    What it changes for that time, and why:

    - The decoder sees a mask over context and decision, while everything above it (the auxiliary loss of a
      mixture-of-experts model, which has router logits for the decision only) sees the decision's.
    - Decoder layers keep their cache under gradient checkpointing. transformers drops it, with a warning, since a
      layer that is run again would write again; a frozen context is only read.

    Raises:
        ContextMismatchError: Attention did not read the context it was given.
        ValueError: A decision of one token.
    """
    pretrained = get_pretrained_model(model)
    decoder = get_decoder(pretrained)
    checkpointed = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    _freeze_latent_expansions(decoder)
    for module in checkpointed:
        module._can_checkpoint_with_cache = True
    handle = decoder.register_forward_pre_hook(_mask_context_and_decision, with_kwargs=True)
    try:
        with segmented_forward() if is_segmented(pretrained) else nullcontext() as record:
            yield
            _require_all_read(record, pretrained.config.model_type)
    finally:
        handle.remove()
        for module in checkpointed:
            del module._can_checkpoint_with_cache


def _mask_context_and_decision(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    frozen = kwargs.get("past_key_values")
    if not isinstance(frozen, FrozenContext):
        return None
    # Token ids `(B, D)`, or embeddings `(B, D, E)` from a vision-language wrapper; by keyword or by position.
    tokens = next(
        value for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if value is not None
    )
    if tokens.shape[1] < MIN_DECISION_TOKENS:
        raise ValueError(
            f"A decision over a frozen context needs at least {MIN_DECISION_TOKENS} tokens, found {tokens.shape[1]}: "
            "one token runs kernels that write their state in place and have no backward. Pad it on the right."
        )
    decision_mask = kwargs.get("attention_mask")
    if decision_mask is None:
        decision_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return args, {**kwargs, "attention_mask": frozen.attention_mask(decision_mask)}


def _require_all_read(record: SegmentedForward | None, model_type: str) -> None:
    if record is not None and record.num_read != record.num_given:
        raise ContextMismatchError(
            f"The attention of `{model_type}` read {record.num_read} of the {record.num_given} frozen contexts it was "
            "given: it does not hand the cache's keys to transformers' AttentionInterface as they are. Load the model "
            "with `attn_implementation='eager'`, or train it with `tier: 1`."
        )


def _freeze_latent_expansions(decoder: torch.nn.Module) -> None:
    """Stops the gradient of `kv_b_proj` at context positions.

    The hook stays on the module, since the backward pass may run the layer again; it acts only on latents that come
    out of a frozen context.
    """
    for name, module in decoder.named_modules():
        if name.rsplit(".", 1)[-1] in LATENT_EXPANSIONS and _detach_context not in module._forward_hooks.values():
            module.register_forward_hook(_detach_context)


def _detach_context(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    length = frozen_length(args[0])
    if not length:
        return None
    return torch.cat([output[..., :length, :].detach(), output[..., length:, :]], dim=-2)
