# SPDX-License-Identifier: Apache-2.0
"""The forward of decisions over a frozen context."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.context.boundary import MIN_DECISION_TOKENS
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.handover import counted_forward, current_use, is_counted, require_all_read
from frozen_peft.context.latents import freeze_latent_expansions
from frozen_peft.context.models import get_decoder, get_pretrained_model, require_known_positions
from frozen_peft.context.rope import RopeLimits, rope_limits, rows_of_lengths
from frozen_peft.context.segments import is_segmented
from frozen_peft.errors import ContextMismatchError
from frozen_peft.utils.cache_argument import given_cache, under_own_name
from frozen_peft.utils.compat.transformers import keeping_cache_under_checkpointing

__all__ = ["cache_under_checkpointing", "decision_forward", "require_encoded_for", "rows_of_samples"]


@contextmanager
def decision_forward(model: torch.nn.Module) -> Iterator[None]:
    """Lets `model(..., cache=frozen_context)` run forward, to be followed by an ordinary backward.

    Up to transformers 5.23 the argument has another name (see `as_cache_argument`); any that is known will do.

    Inside, the model takes decisions padded on the right: `input_ids`, `attention_mask` and `position_ids` of shape
    `(B, D)` with D of 2 or more, positions counted from the start of each context (the default). Forwards without a
    frozen context are not affected. The backward pass may run outside.

    What it changes for that time, and why:

    - The decoder sees a mask over context and decision, while everything above it (the auxiliary loss of a
      mixture-of-experts model, which has router logits for the decision only) sees the decision's.
    - Decoder layers keep their cache under gradient checkpointing. transformers drops it, with a warning, since a
      layer that is run again would write again; a frozen context is only read.
    - A rope that follows the length of a forward follows that of each whole sample (see `rope`).

    Raises:
        ContextMismatchError: Attention did not read the context it was given, or that was encoded for a sample of
            another length where this counts.
        ValueError: A decision of one token.
    """
    pretrained = get_pretrained_model(model)
    decoder = get_decoder(pretrained)
    if is_counted(decoder):
        # Inside of another one, which sees to all of this.
        yield
        return
    freeze_latent_expansions(decoder)
    running = ExitStack()

    def compute_rows(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        frozen = given_cache(kwargs)
        if not isinstance(frozen, FrozenContext):
            return None
        changed = _mask_context_and_decision(frozen, args, kwargs)
        running.enter_context(rows_of_samples(pretrained, frozen, kwargs.get("attention_mask"), _tokens(args, kwargs)))
        return changed

    def finish_rows(*_: Any) -> None:
        running.close()

    handles = [
        # Of a model that is its own decoder, once.
        *(module.register_forward_pre_hook(_name_cache, with_kwargs=True) for module in {pretrained, decoder}),
        decoder.register_forward_pre_hook(compute_rows, with_kwargs=True),
        decoder.register_forward_hook(finish_rows, always_call=True),
    ]
    try:
        with cache_under_checkpointing(decoder), counted_forward(is_segmented(pretrained), decoder) as use:
            yield
            require_all_read(use, pretrained.config.model_type)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def cache_under_checkpointing(decoder: PreTrainedModel) -> Iterator[None]:
    """Lets decoder layers keep a cache that is only read under gradient checkpointing."""
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Some decoders (gpt2) drop the cache themselves when their own flag is set; their layers have one each.
    has_flag = getattr(decoder, "gradient_checkpointing", False)
    if has_flag:
        decoder.gradient_checkpointing = False
    try:
        with keeping_cache_under_checkpointing(layers):
            yield
    finally:
        if has_flag:
            decoder.gradient_checkpointing = True


@contextmanager
def rows_of_samples(
    model: PreTrainedModel, frozen: FrozenContext, decision_mask: torch.Tensor | None, tokens: torch.Tensor
) -> Iterator[None]:
    """Has a forward over frozen contexts compute positions as one over each whole sample would (see `rope`).

    Args:
        model: The transformers model.
        frozen: The contexts.
        decision_mask: 1 on decision tokens, 0 on padding, shape `(B, D)`; None: there is no padding.
        tokens: The decisions, shape `(B, D)` or `(B, D, E)`.

    Raises:
        ContextMismatchError: A context was encoded for a sample whose length has other frequencies.
        ValueError: See `require_known_positions`.
    """
    require_known_positions(model, frozen.lengths, tokens.shape[1])
    limits = rope_limits(model)
    if not limits.all:
        yield
        return
    num_decision = [tokens.shape[1]] * len(tokens) if decision_mask is None else decision_mask.sum(-1).tolist()
    lengths = [before + own for before, own in zip(frozen.lengths, num_decision, strict=True)]
    require_encoded_for(limits, frozen, lengths)
    with rows_of_lengths(model, lengths):
        yield


def require_encoded_for(limits: RopeLimits, frozen: FrozenContext, lengths: Sequence[int]) -> None:
    """Refuses contexts whose positions were computed otherwise than those of samples of these lengths.

    Raises:
        ContextMismatchError: A context was encoded for a sample whose length has other frequencies.
    """
    for length, rope_length in zip(lengths, frozen.rope_lengths, strict=True):
        if limits.rope_length(length) != rope_length:
            raise ContextMismatchError(
                f"A context of a sample of {length} tokens was encoded for another length: the rope of "
                f"`{limits.model_type}` computes all positions by how long a sample is, beyond {limits.all[0]} tokens "
                "by other factors. Encode it as `ContextTokens(tokens, num_sample_tokens)`, and pass the decisions' "
                "`attention_mask`."
            )


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Token ids `(B, D)`, or embeddings `(B, D, E)` from a vision-language wrapper; by keyword or by position."""
    return next(value for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if value is not None)


def _name_cache(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    return (args, under_own_name(module, kwargs)) if isinstance(given_cache(kwargs), FrozenContext) else None


def _mask_context_and_decision(
    frozen: FrozenContext, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if (use := current_use()) is not None:
        use.num_expected += frozen.num_states
    tokens = _tokens(args, kwargs)
    if tokens.shape[1] < MIN_DECISION_TOKENS:
        raise ValueError(
            f"A decision over a frozen context needs at least {MIN_DECISION_TOKENS} tokens, found {tokens.shape[1]}: "
            "one token runs kernels that write their state in place and have no backward. Pad it on the right."
        )
    decision_mask = kwargs.get("attention_mask")
    if decision_mask is None:
        decision_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    kwargs = {**kwargs, "attention_mask": frozen.attention_mask(decision_mask)}
    if kwargs.get("position_ids") is None:
        lengths = torch.tensor(frozen.lengths, device=tokens.device)
        kwargs = {**kwargs, "position_ids": lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)}
    return args, kwargs
