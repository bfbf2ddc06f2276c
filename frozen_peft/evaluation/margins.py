# SPDX-License-Identifier: Apache-2.0
"""What the instructions do for a decision: its log-probability with them, less that without them.

The margin of a decision is the mean over its tokens, those that are trained on, to the end of its turn:
`(log p(decision | with instructions) − log p(decision | without)) / tokens`, in nats. A decision that only the
instructions produce has a large one, one that the model makes anyway has none to teach.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from frozen_peft.evaluation.candidates import Candidate, PromptRow
from frozen_peft.evaluation.decision_scores import DecisionScorer
from frozen_peft.evaluation.decision_tokens import TokenizedDecision, decision_tokens

__all__ = ["DecisionMargin"]


class DecisionMargin:
    """Measures margins with a local model, its adapters on if it has any.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        tokenizer: The model's.
        batch_size: Decisions per forward.
        chunk_size: Context tokens per prefill forward; 0: one forward.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        chunk_size: int = 2048,
    ):
        self._tokenizer = tokenizer
        self._scorer = DecisionScorer(model, batch_size=batch_size, chunk_size=chunk_size)

    def measure(self, rows: Sequence[PromptRow], candidates: Sequence[Candidate]) -> list[float]:
        """Margins of candidates, in nats per token.

        Args:
            rows: The prompt of each candidate, with `stripped`.
            candidates: The decisions.

        Raises:
            ValueError: A decision is tokenized differently with the instructions than without.
            ContextMismatchError: A decision over a frozen context is not what a plain forward gives.
        """
        pairs = [self._tokenized(row, candidate) for row, candidate in zip(rows, candidates, strict=True)]
        found = self._scorer.score([decision for pair in pairs for decision in pair], weights=("adapted",))["adapted"]
        return [
            (instructed.logprob - stripped.logprob) / instructed.num_tokens
            for instructed, stripped in zip(found[::2], found[1::2], strict=True)
        ]

    def _tokenized(self, row: PromptRow, candidate: Candidate) -> tuple[TokenizedDecision, TokenizedDecision]:
        """A decision with the instructions and without them."""
        assert row.stripped is not None, "prompts were read with marks"
        name = f"{row.place}, candidate {candidate.number}"
        instructed, stripped = (
            decision_tokens(self._tokenizer, row, prompt, candidate.decision, name)
            for prompt in (row.prompt, row.stripped)
        )
        if not torch.equal(instructed.decision, stripped.decision):
            raise ValueError(
                f"{name} has other tokens with the instructions than without, so there is no margin: "
                f"{len(instructed.decision)} and {len(stripped.decision)} of them. Let the prompt end in text that "
                "stays when it is stripped"
            )
        return instructed, stripped
