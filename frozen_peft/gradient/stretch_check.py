# SPDX-License-Identifier: Apache-2.0
"""A check on one sample that stretches give the hidden states and the gradient of one plain forward and backward.

The sample is cut to a bounded length that still exercises every kind of layer, a sliding window included. In place of
a loss stands a fixed random direction in the hidden states of all tokens, so that no logits are computed.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from frozen_peft.context.compiled import not_compiled
from frozen_peft.context.dropout import has_dropout
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.modes import without_dropout
from frozen_peft.context.rope import rope_limits
from frozen_peft.context.sharding import are_sharded, run_within_forward
from frozen_peft.context.verify import context_tokens_needed, has_low_precision
from frozen_peft.errors import ContextMismatchError
from frozen_peft.gradient.stretches import stretched_forward

__all__ = ["MIN_TOKENS_TO_VERIFY", "StretchCheck", "verify_stretches"]

# Relative errors in the Euclidean norm.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_LOW_PRECISION = 3e-1
# So that there are two stretches at least.
MIN_TOKENS_TO_VERIFY = 4
NUM_STRETCHES = 3


@dataclass(frozen=True)
class StretchCheck:
    """What a check found.

    Attributes:
        hidden_error: Relative error of the hidden states.
        gradient_error: Relative error of the gradient of all trainable weights together; None where weights are in
            shards, and it was not compared.
        tolerance: The largest error allowed.
        num_tokens: Tokens compared.
        stretch_size: Tokens per stretch.
    """

    hidden_error: float
    gradient_error: float | None
    tolerance: float
    num_tokens: int
    stretch_size: int


def verify_stretches(model: torch.nn.Module, input_ids: torch.Tensor, stretch_size: int) -> StretchCheck:
    """Compares a sample in stretches with one plain forward and backward.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one; modes and gradients are left alone.
        input_ids: Tokens of one sample, shape `(tokens,)`, int64, at least `MIN_TOKENS_TO_VERIFY`.
        stretch_size: Tokens per stretch; made smaller so that there are several.

    Returns:
        The differences found.

    Raises:
        ContextMismatchError: A difference is beyond tolerance (relative, 1e-3 in float32; 0.3 in 16 bit or on a 4-bit
            base, where rounding chooses other experts and other quantized values).
    """
    pretrained = get_pretrained_model(model)
    # Stretches of a third must overflow a window too.
    num_tokens = 2 * context_tokens_needed(pretrained)
    num_tokens = max(num_tokens, rope_limits(pretrained).crossed(len(input_ids)) + MIN_TOKENS_TO_VERIFY)
    input_ids = input_ids[:num_tokens]
    stretch_size = min(stretch_size, -(-len(input_ids) // NUM_STRETCHES))
    plain = _hidden_and_gradient(model, input_ids, not_compiled())
    found = _hidden_and_gradient(model, input_ids, stretched_forward(model, stretch_size))
    errors = [_relative_error(one, other) for one, other in zip(found, plain, strict=True)]
    check = StretchCheck(
        errors[0],
        errors[1] if len(errors) > 1 else None,
        TOLERANCE_LOW_PRECISION if has_low_precision(pretrained) else TOLERANCE_FLOAT32,
        len(input_ids),
        stretch_size,
    )
    # Negated, so that a NaN is an error as well.
    if not all(error <= check.tolerance for error in errors):
        of_gradient = f" and that of the gradient {errors[1]:.2e}" if len(errors) > 1 else ""
        raise ContextMismatchError(
            f"`{pretrained.config.get_text_config().model_type}` does not run exactly in stretches of the sequence: "
            f"over {check.num_tokens} tokens in stretches of {check.stretch_size} the relative error of the hidden "
            f"states is {errors[0]:.2e}{of_gradient}, where {check.tolerance:.0e} is allowed. Leave "
            "`sequence_chunk_size` out, use another architecture, or a newer transformers."
        )
    return check


def _hidden_and_gradient(
    model: torch.nn.Module, input_ids: torch.Tensor, mode: AbstractContextManager[Any]
) -> list[torch.Tensor]:
    """Hidden states `(1, tokens, E)` and, of weights that are not in shards, the gradient as one vector."""
    pretrained = get_pretrained_model(model)
    decoder = get_decoder(pretrained)
    positions = torch.arange(len(input_ids), device=input_ids.device)[None]
    sharded = are_sharded(model)

    def run() -> torch.Tensor:
        return decoder(input_ids=input_ids[None], position_ids=positions, use_cache=False).last_hidden_state

    keep_checkpointing = not sharded and not has_dropout(pretrained)
    plain = without_dropout(model, keep_checkpointing=keep_checkpointing)
    with torch.set_grad_enabled(not sharded), plain, mode:
        if sharded:
            return [run_within_forward(model, run)]
        hidden = run()
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
        loss = (hidden.float() * direction).sum()
        if not loss.requires_grad:
            return [hidden, hidden.new_zeros(1)]
        weights = [weight for weight in decoder.parameters() if weight.requires_grad]
        # Layers under activation checkpoints run again in here, without dropout as the first time.
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return [hidden.detach(), torch.cat([gradient.flatten().float() for gradient in gradients if gradient is not None])]


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference, norm = (actual.float() - expected.float()).norm(), expected.float().norm()
    return (difference / norm).item() if norm > 0.0 else difference.item()
