# SPDX-License-Identifier: Apache-2.0
"""The exact full gradient, with the activations of one stretch of the sequence at a time.

A causal decoder is a chain over positions: what a stretch of the sequence needs of the tokens before it are keys and
values (attention) and a state (linear attention), which the stretches before it produced.

1. Forward: the stretches run from first to last without gradient. Kept are the last hidden states that the loss is
   computed from, those of the first label's predecessor and on; keys and values; and the linear-attention states that
   each stretch starts from.
2. The loss is the caller's. To autograd the decoder is one function of its trainable weights (and of embeddings that
   are passed in), so its backward pass is called once, with the gradient of these hidden states.
3. Backward: the stretches run from last to first. Each is computed again, with gradient, from the states that it
   started from, and differentiated given the gradient of its hidden states, of the keys and values that later
   stretches read, and of the states that the next one started from. What comes out is gradient of the weights, which
   adds up, of keys and values before it, which adds up in float32, and of its starting states, which goes to the
   stretch before.

Nothing is approximated: the gradient is that of one forward over the whole sequence, up to rounding. The idea for
attention: SeCO, arXiv 2505.16710.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from frozen_peft.context.adapter_kinds import require_adapters_by_position
from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.latents import freeze_latent_expansions
from frozen_peft.context.models import get_decoder, get_pretrained_model, require_exact_continuation
from frozen_peft.context.sharding import are_sharded
from frozen_peft.gradient.stretched_decoder import MIN_STRETCH_TOKENS, StretchedDecoder
from frozen_peft.utils.cache_argument import given_cache
from frozen_peft.utils.compat.transformers import checkpoint_function

__all__ = ["Stretching", "finish_stretches", "stretched_forward"]

# What a decoder may be called with; any other tensor would have to be cut into stretches in a way that only the model
# knows.
KNOWN_TENSORS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}


@dataclass
class Stretching:
    """How the forwards to come are run.

    Attributes:
        first_output: See `stretched_forward`.
    """

    first_output: int = 0


@contextmanager
def stretched_forward(
    model: torch.nn.Module,
    stretch_size: int,
    *,
    first_output: int = 0,
    offload: bool = False,
    pending: list[StretchedDecoder] | None = None,
    short_too: bool = False,
) -> Iterator[Stretching]:
    """Lets `model(...)` run its decoder in stretches of the sequence, forward and backward.

    Inside, the model is called as ever, without a cache or with a `FrozenContext` as its cache; the backward
    pass may run outside. A sequence of at most `stretch_size` tokens without a frozen context runs as ever, unless
    weights are in shards or `short_too`.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        stretch_size: Tokens per stretch; no stretch is shorter than two, so that 1 means 2.
        first_output: The decoder gives the last hidden states of this token and those behind it alone, `(B, S -
            first_output, E)`, where a loss needs no others: with labels from here on, what is kept of a long sequence
            is keys, values and their gradient. Labels have to be cut the same way.
        offload: Keep keys, values, their gradients and starting states in host memory, and copy them to the model's
            device as they are needed.
        pending: Where weights are in shards, gets the stretches that a backward pass leaves for `finish_stretches`.
        short_too: Run a short sequence in one stretch. Stretches give the weights their gradients in another order
            than plain layers do, and an engine may need the same order on every process.

    Yields:
        What may still be changed for the forwards to come.

    Raises:
        ContextMismatchError: The architecture does not continue exactly from a cache, or lost it on the way.
        UnsupportedArchitectureError: The architecture has no cache, or one that stretches cannot hand on.
        ValueError: Reentrant checkpoints, adapters that act on parts of a sequence otherwise than on the whole,
            samples that are padded on the left or flattened into one row, or arguments that cannot be cut into
            stretches.
    """
    if stretch_size < 1:
        raise ValueError(f"`sequence_chunk_size` must be 1 token or more, found {stretch_size}.")
    pretrained = get_pretrained_model(model)
    require_exact_continuation(pretrained)
    require_adapters_by_position(model)
    _require_plain_checkpoints(pretrained)
    choose_kernels(pretrained)
    decoder = get_decoder(pretrained)
    freeze_latent_expansions(decoder)
    forward = decoder.forward
    had_own = "forward" in vars(decoder)
    stretching = Stretching(first_output)
    sharded = are_sharded(model)
    # Then, a short sequence runs in step with the longer ones of other processes.
    always = sharded or short_too

    @functools.wraps(forward)
    def in_stretches(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
        frozen = isinstance(given_cache(arguments), FrozenContext)
        if not always and not frozen and _tokens(arguments).shape[1] <= max(stretch_size, MIN_STRETCH_TOKENS):
            outputs = forward(*args, **kwargs)
            if stretching.first_output:
                outputs.last_hidden_state = outputs.last_hidden_state[:, stretching.first_output :]
            return outputs
        _require_adapters_everywhere(model)
        _require_stretchable(arguments)
        if sharded:
            _require_no_trained_embeddings(pretrained, arguments)
        return StretchedDecoder(
            pretrained,
            forward,
            arguments,
            stretch_size,
            first_output=stretching.first_output,
            offload=offload,
            root=model if sharded else None,
            pending=pending,
        ).outputs()

    decoder.forward = in_stretches
    try:
        yield stretching
    finally:
        if had_own:
            decoder.forward = forward
        else:
            del decoder.forward


def finish_stretches(pending: list[StretchedDecoder]) -> None:
    """Runs backward what a backward pass over weights in shards left, on every process in the same order."""
    while pending:
        pending.pop(0).finish()


def _tokens(arguments: dict[str, Any]) -> torch.Tensor:
    """Token ids `(B, S)` or embeddings `(B, S, E)`."""
    tokens = arguments.get("input_ids")
    return arguments["inputs_embeds"] if tokens is None else tokens


def _require_plain_checkpoints(model: PreTrainedModel) -> None:
    for module in model.modules():
        if getattr(checkpoint_function(module), "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "`sequence_chunk_size` needs non-reentrant checkpoints: a reentrant one hides keys, values and states "
                "from autograd. Remove `use_reentrant` from `gradient_checkpointing_kwargs`, or set it to False."
            )


def _require_no_trained_embeddings(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    if arguments.get("inputs_embeds") is not None and model.get_input_embeddings().weight.requires_grad:
        raise ValueError(
            "`sequence_chunk_size` with weights in shards (FSDP) cannot train embeddings that are computed outside of "
            "the text decoder, as vision-language models do. Freeze them, or use DDP."
        )


def _require_adapters_everywhere(model: torch.nn.Module) -> None:
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        raise ValueError(
            "`sequence_chunk_size` cannot run an adapter that its invocation tokens switch on within a sequence "
            "(`alora_invocation_tokens`). Set `context_adapters=False`, or leave one of the two out."
        )


def _require_stretchable(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name not in KNOWN_TENSORS:
            raise ValueError(
                f"`sequence_chunk_size` does not know how to cut `{name}` into stretches. Samples that are flattened "
                "into one row (`packing`, `padding_free` or a collator that does the same) are not supported."
            )
    for name in ("output_hidden_states", "output_attentions"):
        if arguments.get(name):
            raise ValueError(f"`{name}` would keep what `sequence_chunk_size` is there not to keep; leave one out.")
    past = given_cache(arguments)
    if past is not None and not isinstance(past, FrozenContext):
        raise ValueError(
            f"`sequence_chunk_size` runs without a cache or behind a `FrozenContext`, found a {type(past).__name__}."
        )
    mask = arguments.get("attention_mask")
    if mask is not None:
        kept = mask.bool()
        if kept.ndim != 2 or bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            raise ValueError(
                "`sequence_chunk_size` needs an `attention_mask` of shape (samples, tokens) with padding on the right "
                f"only, found one of shape {tuple(kept.shape)}. Padding on the left would run through the states of "
                "linear attention."
            )
    positions = arguments.get("position_ids")
    if positions is not None and positions.ndim == 2 and not bool((positions.diff(dim=-1) == 1).all()):
        raise ValueError(
            "`sequence_chunk_size` needs consecutive `position_ids` in each row. Samples that are flattened into one "
            "row (`packing`, `padding_free`) are not supported."
        )
