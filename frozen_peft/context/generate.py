# SPDX-License-Identifier: Apache-2.0
"""Decoding over frozen contexts: transformers' own `generate`, going on from what is encoded already.

1. The last token of each prompt is left out of its context, as in training: its output is the first token's.
2. `generate` takes a cache that grows over the frozen contexts (see `growing`), and so begins with that token.
3. Which token comes next is decided by a row's own numbers between 0 and 1, one per token, and not by a random state
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
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.growing import growing_cache
from frozen_peft.context.handover import counted_forward, require_all_read
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.modes import without_dropout
from frozen_peft.utils.cache_argument import generation_cache

__all__ = ["generate_over"]


class _Drawn(LogitsProcessor):
    """Leaves one token to choose: where a row's number falls in the distribution.

    Args:
        draws: Numbers in [0, 1), shape `(B, N)`, float64.
        num_prompt_tokens: Columns before the first new token.
        temperature: Divides the logits.
        top_p: Probability that the likeliest tokens must come to; the others are left out.
    """

    def __init__(self, draws: torch.Tensor, num_prompt_tokens: int, temperature: float, top_p: float):
        self.draws, self.num_prompt_tokens = draws, num_prompt_tokens
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
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
) -> list[list[int]]:
    """Decodes one candidate for each prompt.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one with its adapters on.
        frozen: The prompts without their last tokens, one row each, encoded by this model; None where every prompt
            is a single token.
        prompts: Token ids of each prompt, at least one each.
        draws: Numbers in [0, 1) that decide what is drawn, shape `(B, max_new_tokens)`; None: the likeliest token.
        max_new_tokens: Tokens after which a candidate ends, finished or not.
        stop_tokens: Tokens that end a candidate.
        temperature: Divides the logits before drawing.
        top_p: Draw from the likeliest tokens that come to this probability.

    Returns:
        New tokens of each candidate, up to and with the token that ended it.

    Raises:
        ContextMismatchError: The model's attention did not read the contexts.
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
        processors.append(_Drawn(torch.from_numpy(draws).to(device), longest, temperature, top_p))
    # A configuration of its own: the checkpoint's may hold penalties, other limits and another way to draw.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_tokens), pad_token_id=stop_tokens[0]
    )
    segmented = frozen is not None and frozen.segmented
    with torch.no_grad(), without_dropout(model), counted_forward(segmented) as use:
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


def _until_stop(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in stop_tokens), len(tokens) - 1)
    return tokens[: end + 1]
