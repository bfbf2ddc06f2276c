# SPDX-License-Identifier: Apache-2.0
"""What a metric sees of an evaluation: one row per sample, which holds the tokens of its decisions.

1. A sample's decisions stand in its row one after the other, and padding follows. Each begins with the token that
   predicts its first label and has no label itself, so the output at a column predicts the label of the next one, as
   in the rows of `SFTTrainer`. What is missing of those are context tokens, whose outputs were never computed.
2. There are as many rows as samples, since whoever gathers them counts samples: of the last batch accelerate keeps as
   many rows as samples are left, and drops those that fill it up on several processes.
3. Inputs are laid out like logits and labels, so that the three belong to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from frozen_peft.context.boundary import IGNORED_LABEL, MIN_DECISION_TOKENS
from frozen_peft.training.batches import DecisionBatch, num_labels

__all__ = ["Prediction", "SampleRows", "join_predictions"]

# Loss, logits and labels.
Prediction = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class SampleRows:
    """Puts batches of decisions into rows of samples.

    Attributes:
        lengths: Tokens of each decision, by sample.
    """

    lengths: Sequence[Sequence[int]]

    @classmethod
    def of(cls, parts: Sequence[DecisionBatch], num_decisions: Sequence[int]) -> "SampleRows":
        """Of batches of decisions, padded on the right, of which each sample has so many."""
        lengths = iter([int(length) for part in parts for length in part["attention_mask"].sum(dim=1)])
        return cls([[next(lengths) for _ in range(count)] for count in num_decisions])

    def join(self, name: str, parts: Sequence[torch.Tensor], padding: int = IGNORED_LABEL) -> torch.Tensor:
        """Rows of samples.

        Args:
            name: What the tensors are, for the error.
            parts: Of every part of a batch, shape `(decisions, tokens, ...)`.
            padding: Fills what no decision does.

        Returns:
            Shape `(samples, tokens, ...)`.

        Raises:
            ValueError: A tensor has no column for every token.
        """
        if len(parts) == 1 and all(len(own) == 1 for own in self.lengths):
            return parts[0]
        width = max(MIN_DECISION_TOKENS, *map(sum, self.lengths))
        joined = parts[0].new_full((len(self.lengths), width, *parts[0].shape[2:]), padding)
        decisions = iter([decision for part in parts for decision in part])
        for sample, own in zip(joined, self.lengths, strict=True):
            column = 0
            for length in own:
                decision = next(decisions)
                if len(decision) < length:
                    raise ValueError(
                        f"The {name} of a decision of {length} tokens have {len(decision)} rows. Give a metric the "
                        f"{name} of every token of the batch, or return none."
                    )
                sample[column : column + length] = decision[:length]
                column += length
        return joined

    def inputs(self, parts: Sequence[DecisionBatch], pad_token_id: int) -> dict[str, torch.Tensor]:
        """The batch of samples that was predicted, without its contexts."""
        paddings = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "attention_mask": 0, "completion_mask": 0}
        present = {name: value for name, value in paddings.items() if name in parts[0]}
        return {name: self.join(name, [part[name] for part in parts], value) for name, value in present.items()}


def join_predictions(
    predictions: Sequence[Prediction], parts: Sequence[DecisionBatch], rows: SampleRows
) -> Prediction:
    """What was predicted of a batch, of what was predicted of its parts.

    Args:
        predictions: Mean loss, logits `(decisions, tokens, vocabulary)` and labels `(decisions, tokens)` of each.
        parts: The parts.
        rows: Of their samples.

    Returns:
        The mean loss over the labels of all parts, and logits and labels in rows of samples.
    """
    losses, logits, labels = zip(*predictions, strict=True)
    loss = losses[0]
    if loss is not None and len(losses) > 1:
        weights = [num_labels(part) for part in parts]
        loss = sum(part * weight for part, weight in zip(losses, weights, strict=True)) / max(sum(weights), 1)
    return loss, _joined("logits", logits, rows), _joined("labels", labels, rows)


def _joined(name: str, of_parts: Sequence[Any], rows: SampleRows) -> torch.Tensor | None:
    return None if of_parts[0] is None else rows.join(name, of_parts)
