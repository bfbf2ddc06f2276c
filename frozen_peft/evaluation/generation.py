# SPDX-License-Identifier: Apache-2.0
"""Candidates from a local model: one prefill for each shared context, then batches of candidates.

1. Prompts are worked through in the order of their tokens, so that those that begin alike follow each other. What they
   share is encoded once, and dropped when the last of them has come (`ContextEncoder`).
2. The candidates of a prompt are decoded from its one encoded context, and those of several prompts together.
3. What is drawn for a candidate depends on its seed alone (`context.generate`). The rows beside it, and what is
   already done when a job goes on, change the last digits of its logits and nothing else.
4. A candidate is written in the form that trains as it was generated (`candidate_forms`).
"""

import json
from collections.abc import Iterator, Sequence, Set

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from frozen_peft.adapters.activated import require_always_active
from frozen_peft.context import (
    ContextEncoder,
    ContextTokens,
    generate_over,
    stop_tokens_of,
    tokens_within_rope,
    use_segmented_attention,
)
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.context.prefixes import token_order
from frozen_peft.evaluation.candidate_forms import CandidateForms
from frozen_peft.evaluation.candidates import Candidate, PromptRow, SamplingSettings
from frozen_peft.evaluation.decision_tokens import prompt_tokens
from frozen_peft.evaluation.model_loading import num_positions, require_adapters_on_weights

__all__ = ["LocalSampler"]


class LocalSampler:
    """Samples from a model of transformers.

    The model's attention may be switched to the exact one over two segments (`use_segmented_attention`).

    Args:
        model: A causal language model, or a `PeftModel` of one, which samples with its adapters.
        tokenizer: The model's.
        settings: How candidates are drawn.
        batch_size: Candidates that are decoded together.
        chunk_size: Context tokens per prefill forward; 0: one forward.

    Raises:
        ValueError: `batch_size` is out of range, or an adapter is switched on by tokens or puts in tokens of its own.
        ContextMismatchError: transformers does not continue this architecture exactly from a cache.
        UnsupportedArchitectureError: The model has no cache to continue from.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        *,
        batch_size: int = 16,
        chunk_size: int = 2048,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 candidate or more, got {batch_size}")
        require_always_active(model)
        require_adapters_on_weights(model)
        self._model, self._tokenizer, self._settings, self._batch_size = model, tokenizer, settings, batch_size
        self._pretrained = get_pretrained_model(model)
        self._encoder = ContextEncoder(model, chunk_size=chunk_size)
        self._stop_tokens = stop_tokens_of(tokenizer, self._pretrained.generation_config)
        self._forms = CandidateForms(tokenizer, self._stop_tokens)
        self._tokens: dict[str, list[int]] = {}
        use_segmented_attention(model)

    def check(self, rows: Sequence[PromptRow]) -> None:
        """Refuses prompts that could not be sampled for, before anything is sampled.

        Raises:
            ValueError: A prompt has no tokens, or more than the model has positions.
        """
        limit = num_positions(self._pretrained)
        for row in rows:
            num_tokens = len(self._prompt(row))
            if limit is not None and num_tokens + self._settings.max_new_tokens > limit:
                raise ValueError(
                    f"{row.place}: {num_tokens} tokens and `max_new_tokens` {self._settings.max_new_tokens} are more "
                    f"than the {limit} positions of the model; shorten the prompt"
                )

    def sample(self, rows: Sequence[PromptRow], done: Set[tuple[int, int]] = frozenset()) -> Iterator[list[Candidate]]:
        """Samples every candidate of these prompts that is not done.

        Args:
            rows: The prompts.
            done: Index of the prompt and number of the candidate, for those that there are already.

        Yields:
            The candidates of one batch.
        """
        wanted = [
            (row, number)
            for row in sorted(rows, key=lambda row: token_order(np.array(self._prompt(row))))
            for number in range(len(row.seeds))
            if (row.index, number) not in done
        ]
        contexts = {row.index: self._context(self._prompt(row)) for row, _ in wanted}
        self._encoder.expect([contexts[row.index] for row, _ in wanted])
        for batch in self._batches(wanted):
            yield self._decoded(batch)

    def _batches(self, wanted: list[tuple[PromptRow, int]]) -> Iterator[list[tuple[PromptRow, int]]]:
        """Candidates that are decoded together.

        Those that may go beyond a limit of the rope only with others of their prompt: they all reach it at one token.
        """
        batch: list[tuple[PromptRow, int]] = []
        for row, number in wanted:
            if batch and (len(batch) == self._batch_size or not self._go_together(batch[0][0], row)):
                yield batch
                batch = []
            batch.append((row, number))
        if batch:
            yield batch

    def _go_together(self, one: PromptRow, other: PromptRow) -> bool:
        wanted = self._settings.max_new_tokens
        return one is other or all(
            tokens_within_rope(self._model, len(self._prompt(row)), wanted) == wanted for row in (one, other)
        )

    def _decoded(self, batch: list[tuple[PromptRow, int]]) -> list[Candidate]:
        """Candidates of one batch: each the row of its prompt, and its number."""
        settings = self._settings
        draws = None
        if settings.temperature > 0.0:
            generators = [np.random.default_rng(row.seeds[number]) for row, number in batch]
            draws = np.stack([generator.random(settings.max_new_tokens) for generator in generators])
        outputs = self._generated([self._prompt(row) for row, _ in batch], draws, settings.max_new_tokens)
        return [
            self._forms.candidate(row, number, tokens) for (row, number), tokens in zip(batch, outputs, strict=True)
        ]

    def _generated(self, prompts: list[list[int]], draws: np.ndarray | None, max_new_tokens: int) -> list[list[int]]:
        """Candidates of prompts that reach a limit of the rope at the same token, or not at all."""
        # What can be decoded before positions are computed in another way.
        num_alike = min(tokens_within_rope(self._model, len(prompt), max_new_tokens) for prompt in prompts)
        contexts = [self._context(prompt) for prompt in prompts]
        frozen = self._encoder.encode(contexts) if any(map(len, contexts)) else None
        outputs = generate_over(
            self._model,
            frozen,
            prompts,
            draws=draws[:, :num_alike] if draws is not None else None,
            max_new_tokens=num_alike,
            stop_tokens=self._stop_tokens,
            temperature=self._settings.temperature or 1.0,
            top_p=self._settings.top_p,
        )
        unfinished = [row for row, tokens in enumerate(outputs) if tokens[-1] not in self._stop_tokens]
        if num_alike == max_new_tokens or not unfinished:
            return outputs
        longer = [prompts[row] + outputs[row] for row in unfinished]
        rest = self._generated(
            longer,
            draws[unfinished, num_alike:] if draws is not None else None,
            max_new_tokens - num_alike,
        )
        for row, tokens in zip(unfinished, rest, strict=True):
            outputs[row] = outputs[row] + tokens
        return outputs

    def _prompt(self, row: PromptRow) -> list[int]:
        key = json.dumps([row.prompt, row.values.get("tools"), row.values.get("chat_template_kwargs")])
        if key not in self._tokens:
            self._tokens[key] = prompt_tokens(self._tokenizer, row, row.prompt)
        return self._tokens[key]

    def _context(self, prompt: list[int]) -> ContextTokens:
        """All but the last token, whose output is the decision's first token."""
        return ContextTokens(torch.tensor(prompt[:-1], dtype=torch.long), len(prompt))
