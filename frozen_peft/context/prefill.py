# SPDX-License-Identifier: Apache-2.0
"""Prefill: the pass without gradient that encodes tokens, after contexts that are encoded already or after none.

1. Contexts are encoded without padding: alone, or together with others of the same length. Nothing a layer sees can
   therefore depend on what else is in the batch.
2. The tokens run through the decoder chunk by chunk, so that activations are those of one chunk. The decoder is called
   below the language-model head: logits are never computed.
3. Keys and values are written into buffers of their final size, so that a growing cache is never copied. Where those
   of the last layer are the last that is kept, the forward ends with them: its attention and what follows are for
   nobody. (Not with weights in shards, which a forward lets go of at its end.)
4. The result is cut into rows and frozen; from here on its tensors are only read, also by what extends them.

The model is left as it was: no mode is switched through `train()` or `eval()` (a 4-bit layer would repack its
weights), only the flags that dropout and gradient checkpointing look at, and those are put back.
"""

from contextlib import suppress
from functools import partial

import torch

from frozen_peft.context.encoded import EncodedContext
from frozen_peft.context.handover import counted_forward, require_all_read
from frozen_peft.context.models import get_decoder, get_pretrained_model
from frozen_peft.context.rope import rows_of_lengths
from frozen_peft.context.segments import continues_in_segments
from frozen_peft.context.sharding import are_sharded, run_within_forward
from frozen_peft.context.writable import AllWritten, frozen_row, prefill_cache
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = ["extend_contexts", "num_forwards"]


def num_forwards(num_tokens: int, chunk_size: int) -> int:
    """Forwards that it takes to encode so many tokens at the end of a row."""
    return -(-num_tokens // (chunk_size or num_tokens))


def extend_contexts(
    model: torch.nn.Module,
    prefixes: list[EncodedContext],
    input_ids: torch.Tensor,
    *,
    chunk_size: int,
    rope_length: int = 0,
) -> list[EncodedContext]:
    """Encodes the tokens that follow on contexts of one length, or on nothing; called in `prefill_mode`.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        prefixes: What each row goes on from, all of the same number of tokens; empty: the rows are whole contexts.
        input_ids: The tokens to come, shape `(rows, tokens)`, int64.
        chunk_size: Tokens of a row per forward; 0: all in one forward.
        rope_length: How positions are computed (see `rope`), which prefixes are encoded with as well.

    Returns:
        One context per row, prefix and tokens together. The prefixes are shared, and stay as they are.
    """
    pretrained = get_pretrained_model(model)
    decoder = get_decoder(pretrained)
    num_rows, num_tokens = input_ids.shape
    first = prefixes[0].num_tokens if prefixes else 0
    device = pretrained.get_input_embeddings().weight.device
    input_ids = input_ids.to(device)
    segmented = continues_in_segments(pretrained)
    cache = prefill_cache(pretrained, prefixes, num_tokens, segmented, may_end=not are_sharded(model))
    cache_argument = as_cache_argument(decoder, cache)
    step = chunk_size or num_tokens
    # Before it begins, a context knows how long its sample is.
    lengths = [max(rope_length, first + num_tokens)] * num_rows
    with counted_forward(segmented) as use, rows_of_lengths(pretrained, lengths):
        for start in range(0, num_tokens, step):
            chunk = input_ids[:, start : start + step]
            positions = torch.arange(first + start, first + start + chunk.shape[1], device=device)
            positions = positions.expand(num_rows, -1)
            forward = partial(decoder, input_ids=chunk, position_ids=positions, **cache_argument, use_cache=True)
            with suppress(AllWritten):
                run_within_forward(model, forward)
    require_all_read(use, pretrained.config.model_type)
    return [frozen_row(cache, row, first + num_tokens, prefixes[row] if prefixes else None) for row in range(num_rows)]
