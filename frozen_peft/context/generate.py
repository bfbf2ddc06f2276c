# SPDX-License-Identifier: Apache-2.0
"""Decoding over frozen contexts: transformers' own `generate`, going on from what is encoded already.

1. The last token of each prompt, or as many of all of them, is left out of its context, as in training: its output is
   the first token's.
2. `generate` takes a cache that grows over the frozen contexts (see `writable`), and so begins with these tokens.
3. Where the rope follows the length of a forward (see `rope`), each token comes from a forward of the length that it
   stands behind, so a candidate that would cross a limit is refused: decode up to there, and go on from a context that
   is encoded anew.
4. Which token comes next is decided by a row's own numbers between 0 and 1, one per token, and not by a random state
   that the rows of a batch share. A row's candidate therefore does not depend on which rows are beside it, except
   through the last digits of its logits.

Shapes: B rows, P tokens of the longest prompt, N new tokens, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.decision import require_encoded_for
from frozen_peft.context.handover import counted_forward, require_all_read
from frozen_peft.context.models import get_pretrained_model, require_known_positions
from frozen_peft.context.modes import without_dropout
from frozen_peft.context.rope import rope_limits, rows_of_lengths
from frozen_peft.context.writable import growing_cache
from frozen_peft.utils.cache_argument import generation_cache

__all__ = ["generate_over", "stop_tokens_of", "tokens_within_rope"]


class _Drawn(LogitsProcessor):
    """Leaves one token to choose: where a row's number falls in the distribution.

    Args:
        draws: Numbers in [0, 1), shape `(B, N)`, float64.
        num_prompt_tokens: Columns before the first new token.
        temperature: Divides the logits.
        top_p: Probability that the likeliest tokens must come to; the others are left out.
        top_k: The likeliest tokens that are not left out before that; 0: none are.
    """

    def __init__(self, draws: torch.Tensor, num_prompt_tokens: int, temperature: float, top_p: float, top_k: int):
        self.draws, self.num_prompt_tokens = draws, num_prompt_tokens
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)` that are 0 for the token chosen and `-inf` for every other."""
        cumulative = self.warpers(input_ids, scores.double()).softmax(-1).cumsum(-1)
        total = cumulative[:, -1:].contiguous()
        draws = self.draws[:, input_ids.shape[1] - self.num_prompt_tokens, None] * total
        # The first token whose share reaches beyond the number; rounding must not take it past the last that has one.
        chosen = torch.minimum(
            torch.searchsorted(cumulative, draws, right=True), torch.searchsorted(cumulative, total)
        )
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen, 0.0)


def generate_over(
    model: torch.nn.Module,
    frozen: FrozenContext | None,
    prompts: Sequence[Sequence[int]],
    *,
    draws: np.ndarray | None,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[list[int]]:
    """Decodes one candidate for each prompt.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one with its adapters on.
        frozen: The prompts without their last tokens, as many of each, one row each, encoded by this model; None where
            nothing is left of any prompt.
        prompts: Token ids of each prompt, at least one each.
        draws: Numbers in [0, 1) that decide what is drawn, shape `(B, max_new_tokens)`; None: the likeliest token.
        max_new_tokens: Tokens after which a candidate ends, finished or not.
        stop_tokens: Tokens that end a candidate.
        temperature: Divides the logits before drawing.
        top_p: Draw from the likeliest tokens that come to this probability.
        top_k: Draw from so many of the likeliest tokens; 0: from all.

    Returns:
        New tokens of each candidate, up to and with the token that ended it.

    Raises:
        ValueError: A candidate would go beyond a limit of the model's rope (`tokens_within_rope`), or see
            `require_known_positions`.
        ContextMismatchError: The model's attention did not read the contexts, or one was encoded for another length.
        UnsupportedArchitectureError: This architecture cannot be decoded from an encoded context.
    """
    pretrained = get_pretrained_model(model)
    device = pretrained.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if draws is not None:
        processors.append(_Drawn(torch.from_numpy(draws).to(device), longest, temperature, top_p, top_k))
    # A configuration of its own: the checkpoint's may hold penalties, other limits and another way to draw.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_tokens), pad_token_id=stop_tokens[0]
    )
    segmented = frozen is not None and frozen.segmented
    lengths = _lengths(pretrained, frozen, prompts, max_new_tokens)
    rows = rows_of_lengths(pretrained, lengths)
    with rows, torch.no_grad(), without_dropout(model), counted_forward(segmented) as use:
        sequences = pretrained.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(device),
            **generation_cache(growing_cache(model, frozen) if frozen is not None else None),
            generation_config=config,
            logits_processor=processors,
        )
        require_all_read(use, pretrained.config.model_type)
    return [_until_stop(row, stop_tokens) for row in sequences[:, longest:].tolist()]


def stop_tokens_of(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Tokens that end a decision: those of the checkpoint's generation configuration and the tokenizer's own.

    Raises:
        ValueError: There are none.
    """
    configured = generation_config.eos_token_id if generation_config is not None else None
    tokens = list(configured) if isinstance(configured, list | tuple) else [configured]
    found = list(dict.fromkeys(token for token in (*tokens, tokenizer.eos_token_id) if token is not None))
    if not found:
        raise ValueError("neither the tokenizer nor the generation configuration has a token that ends a decision")
    return found


def tokens_within_rope(model: torch.nn.Module, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """How many of these tokens come behind a prompt before the model's rope has other frequencies (see `rope`)."""
    last = rope_limits(get_pretrained_model(model)).last_alike(num_prompt_tokens)
    return max_new_tokens if last is None else min(max_new_tokens, last - num_prompt_tokens + 1)


def _lengths(
    model: PreTrainedModel, frozen: FrozenContext | None, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """A length of each row that all its forwards compute positions for."""
    limits = rope_limits(model)
    require_known_positions(model, [len(prompt) for prompt in prompts], max_new_tokens)
    for prompt in prompts:
        num_tokens = tokens_within_rope(model, len(prompt), max_new_tokens)
        if num_tokens < max_new_tokens:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens and `max_new_tokens={max_new_tokens}` go beyond a limit of the "
                f"rope of `{limits.model_type}`, {limits.all}, where all positions before are computed anew. Decode "
                f"{num_tokens} tokens, encode the prompt with them again, and go on from there."
            )
    if frozen is not None:
        require_encoded_for(limits, frozen, [len(prompt) for prompt in prompts])
    return [len(prompt) + max_new_tokens - 1 for prompt in prompts]


def _until_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in stop_tokens), len(tokens) - 1)
    return tokens[: end + 1]
