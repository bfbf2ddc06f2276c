# SPDX-License-Identifier: Apache-2.0
"""Checks on one sample that a decision over a frozen context is what one plain forward would have given.

Two things are compared with plain forwards over context and decision: the decision's log-probabilities, and how they
move when the context is changed. The second catches a lost context also where the model hardly uses it. Both run in a
batch with a longer one, so that what a layer makes of the length of its cache shows too. The sample is cut to a
bounded length that still exercises every kind of layer, a sliding window and a rope that follows lengths included, and
logits are computed at the compared positions only.

What `context_cache_dtype="int8"` rounds is no part of that check, which is as strict with it as without. A second one
measures what rounding alone does to the decision's log-probabilities.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from frozen_peft.context.boundary import ContextTokens
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.compiled import not_compiled
from frozen_peft.context.decision import decision_forward
from frozen_peft.context.dropout import has_dropout
from frozen_peft.context.encoder import encode_context
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.models import (
    counts_from_longest,
    get_decoder,
    get_pretrained_model,
    require_exact_continuation,
)
from frozen_peft.context.modes import adapters_active, without_dropout
from frozen_peft.context.rope import rope_limits
from frozen_peft.context.sharding import run_within_forward
from frozen_peft.context.store import round_in_place
from frozen_peft.errors import ContextMismatchError
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = [
    "ContextCheck",
    "context_tokens_needed",
    "has_low_precision",
    "verify_context",
    "verify_rounding",
]

# Mean absolute difference of log-probabilities per token, in nats.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_LOW_PRECISION = 5e-2
# In float32 rounding is far below what a context does to a decision, so the error must be as well.
FLOAT32_NOISE = 5e-5
MAX_SHARE_OF_EFFECT = 0.1
# Enough context for several chunks of the chunked kernels (64 tokens each) and a remainder.
MIN_CONTEXT_TOKENS = 200
MAX_DECISION_TOKENS = 64


@dataclass(frozen=True)
class ContextCheck:
    """What a check found; all figures are mean absolute differences of log-probabilities per token, in nats.

    Attributes:
        error: Frozen context against plain forward.
        error_changed: The same with a changed context.
        effect: What changing the context does to the plain forward.
        frozen_effect: What it does to the decision over the frozen context.
        tolerance: The largest error allowed.
        num_context_tokens: Context tokens compared.
        num_decision_tokens: Decision tokens compared.
    """

    error: float
    error_changed: float
    effect: float
    frozen_effect: float
    tolerance: float
    num_context_tokens: int
    num_decision_tokens: int


@torch.no_grad()
def verify_context(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    boundary: int,
    *,
    chunk_size: int = 2048,
    adapters: bool = True,
) -> ContextCheck:
    """Compares a decision over a frozen context with plain forwards.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one; its modes are left as they are.
        input_ids: Tokens of one sample, shape `(tokens,)`, int64.
        boundary: Number of context tokens, at least 1 and less than the number of tokens.
        chunk_size: Context tokens per prefill forward; made smaller so that the context takes at least two.
        adapters: Whether adapters are active, in both.

    Returns:
        The differences found.

    Raises:
        ContextMismatchError: A difference is beyond tolerance (1e-3 in float32, 5e-2 in 16 bit or on a 4-bit base),
            or the decision does not react to its context.
        ValueError: There is no context or no decision to compare.
    """
    pretrained = get_pretrained_model(model)
    context, decision = _cut_to_size(pretrained, input_ids, boundary)
    require_exact_continuation(pretrained)
    choose_kernels(pretrained)
    contexts = [context, _changed_context(context, pretrained)]
    chunk_size = min(chunk_size or len(context), max(len(context) // 2, 1))

    with adapters_active(model, adapters):
        plain, plain_changed = (_plain_logprobs(model, tokens, decision) for tokens in contexts)
        frozen, frozen_changed = _frozen_logprobs(model, contexts, decision, chunk_size)
    error, error_changed = _distance(frozen, plain), _distance(frozen_changed, plain_changed)
    effect, frozen_effect = _distance(plain_changed, plain), _distance(frozen_changed, frozen)
    check = ContextCheck(
        error, error_changed, effect, frozen_effect, _tolerance(pretrained, effect), len(context), len(decision)
    )
    _require_match(check, pretrained)
    return check


@torch.no_grad()
def verify_rounding(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    boundary: int,
    *,
    chunk_size: int = 2048,
    adapters: bool = True,
) -> float:
    """Compares a decision over a context in 8 bit with the same over the context as it was encoded.

    Args:
        model: See `verify_context`.
        input_ids: See `verify_context`.
        boundary: See `verify_context`.
        chunk_size: Context tokens per prefill forward.
        adapters: See `verify_context`.

    Returns:
        The mean absolute change of the decision's log-probabilities per token, in nats.

    Raises:
        ContextMismatchError: The difference is beyond 5e-2, what 16 bit are allowed.
        ValueError: There is no context or no decision to compare, or the context is not finite.
    """
    pretrained = get_pretrained_model(model)
    context, decision = _cut_to_size(pretrained, input_ids, boundary)
    with adapters_active(model, adapters):
        whole = ContextTokens(context, len(context) + len(decision))
        frozen = encode_context(model, [whole], chunk_size=chunk_size)
        exact = _logprobs_over(model, frozen, decision)
        round_in_place(frozen.rows[0])
        error = _distance(_logprobs_over(model, frozen, decision), exact)
    # Negated, so that a NaN is an error as well.
    if not error <= TOLERANCE_LOW_PRECISION:
        raise ContextMismatchError(
            f"`context_cache_dtype='int8'` changes the decision's log-probabilities of "
            f"`{pretrained.config.get_text_config().model_type}` by {error:.2e} on average over {len(context)} "
            f"context and {len(decision)} decision tokens, where {TOLERANCE_LOW_PRECISION:.0e} is allowed. Keep "
            "contexts as they are encoded: `context_cache_dtype: auto`."
        )
    return error


def _cut_to_size(model: PreTrainedModel, input_ids: torch.Tensor, boundary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and decision of a sample, cut to what a check compares."""
    if not 0 < boundary < len(input_ids) - 1:
        raise ValueError(
            f"`boundary` must leave at least one context token and two decision tokens, found {boundary} in a sample "
            f"of {len(input_ids)} tokens."
        )
    limit = rope_limits(model).crossed(len(input_ids))
    num_context = max(context_tokens_needed(model), limit)
    num_decision = max(MAX_DECISION_TOKENS, limit + 1 - boundary)
    return input_ids[max(boundary - num_context, 0) : boundary], input_ids[boundary : boundary + num_decision]


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().mean().item()


def _require_match(check: ContextCheck, model: PreTrainedModel) -> None:
    model_type = model.config.get_text_config().model_type
    ways_out = (
        "Train with `tier: 1` (or `gradient_horizon: -1`), which needs no cache, use another architecture, or a newer "
        "transformers."
    )
    # Negated, so that a NaN is an error as well.
    if not max(check.error, check.error_changed) <= check.tolerance:
        raise ContextMismatchError(
            f"`{model_type}` does not continue exactly from a frozen context: over {check.num_context_tokens} context "
            f"and {check.num_decision_tokens} decision tokens the mean error of the decision's log-probabilities is "
            f"{check.error:.2e} ({check.error_changed:.2e} with a changed context), where {check.tolerance:.2e} is "
            f"allowed; changing the context moves them by {check.effect:.2e}. {ways_out}"
        )
    if check.effect > 0.0 and check.frozen_effect == 0.0:
        raise ContextMismatchError(
            f"`{model_type}` has lost its context: changing {check.num_context_tokens} context tokens moves the "
            f"decision's log-probabilities by {check.effect:.2e} in a plain forward, and not at all over the frozen "
            f"context. {ways_out}"
        )


def _tolerance(model: PreTrainedModel, effect: float) -> float:
    if has_low_precision(model):
        return TOLERANCE_LOW_PRECISION
    return min(TOLERANCE_FLOAT32, max(FLOAT32_NOISE, MAX_SHARE_OF_EFFECT * effect))


def has_low_precision(model: PreTrainedModel) -> bool:
    """Whether a forward now rounds to less than float32: its weights are quantized or in 16 bit, or by autocast."""
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    device_type = get_decoder(model).get_input_embeddings().weight.device.type
    return quantized or model.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(device_type)


def context_tokens_needed(model: PreTrainedModel) -> int:
    """Context tokens that overflow every sliding window and fill several chunks of the chunked kernels."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
    return MIN_CONTEXT_TOKENS + max(windows)


def _changed_context(context: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """The context in reverse; where that is no change, other tokens."""
    changed = context.flip(0)
    if torch.equal(changed, context):
        changed = (context + 1) % model.config.get_text_config().vocab_size
    return changed


def _companion(context: torch.Tensor, decision: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """A context that goes on from another one by a third, as far as the model has positions for it.

    It is no longer where rows that differ are known to be inexact, and are refused where that counts.
    """
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    num_more = 0 if counts_from_longest(model) else len(context) // 3 + 1
    if num_positions is not None:
        num_more = max(min(num_more, num_positions - len(context) - len(decision)), 0)
    return torch.cat([context, context[:num_more]])


def _plain_logprobs(model: torch.nn.Module, context: torch.Tensor, decision: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the decision after its first token by one forward, shape `(decision tokens - 1,)`."""
    pretrained = get_pretrained_model(model)

    def logprobs() -> torch.Tensor:
        if rope_limits(pretrained).follows_beyond is not None:
            # transformers (5.23, 5.24) goes on with the frequencies of the longest forward so far, until a short one.
            get_decoder(pretrained)(input_ids=decision[None, :2], use_cache=False)
        # Without positions, as SFTTrainer calls it: some architectures (RoBERTa) count otherwise than from 0.
        hidden = get_decoder(pretrained)(
            input_ids=torch.cat([context, decision])[None], use_cache=False
        ).last_hidden_state
        return _logprobs(pretrained, hidden[0, len(context) :], decision)

    with without_dropout(model), not_compiled():
        return run_within_forward(model, logprobs)


def _frozen_logprobs(
    model: torch.nn.Module, contexts: list[torch.Tensor], decision: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """The same over frozen contexts, shape `(contexts, decision tokens - 1)`."""
    wholes = [*contexts, _companion(contexts[0], decision, get_pretrained_model(model))]
    asked = [ContextTokens(context, len(context) + len(decision)) for context in wholes]
    # Encoded as a context is that extends another one, the way in which most is carried over.
    asked += [ContextTokens(each.tokens[: len(each) // 2], each.num_sample_tokens) for each in asked[: len(contexts)]]
    frozen = encode_context(model, asked, chunk_size=chunk_size).select(list(range(len(wholes))))
    return _logprobs_over(model, frozen, decision)[: len(contexts)]


def _logprobs_over(model: torch.nn.Module, frozen: FrozenContext, decision: torch.Tensor) -> torch.Tensor:
    """The same, with gradient checkpointing as in training where layers have no dropout."""
    pretrained = get_pretrained_model(model)
    decoder = get_decoder(pretrained)
    # Layers that drop out by themselves (OPT) are compared without checkpointing: both hang on their training flag.
    keep_checkpointing = not has_dropout(pretrained)

    def logprobs() -> torch.Tensor:
        hidden = decoder(
            input_ids=decision.expand(len(frozen.rows), -1),
            **as_cache_argument(decoder, frozen),
            use_cache=False,
        ).last_hidden_state
        return torch.stack([_logprobs(pretrained, row, decision) for row in hidden])

    with without_dropout(model, keep_checkpointing=keep_checkpointing), decision_forward(model):
        return run_within_forward(model, logprobs)


def _logprobs(model: PreTrainedModel, hidden: torch.Tensor, decision: torch.Tensor) -> torch.Tensor:
    head = model.get_output_embeddings()
    logits = head(hidden[:-1].to(head.weight.dtype)).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, decision[1:, None]).squeeze(-1)
