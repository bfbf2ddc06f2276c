# SPDX-License-Identifier: Apache-2.0
"""A collated batch of samples as batches of decisions: what TRL sees of it."""

from dataclasses import dataclass
from typing import Any

import torch

from frozen_peft.context import ContextTokens, Cut, Decision, cut_batch, pad_decisions
from frozen_peft.context.boundary import IGNORED_LABEL

__all__ = [
    "CONTEXTS",
    "NUM_CONTEXT_TOKENS",
    "TEACHERS",
    "BatchCutter",
    "from_first_label",
    "num_labels",
    "without_labels",
]

Batch = dict[str, Any]

# What a batch of decisions has besides TRL's keys, until its contexts are encoded.
CONTEXTS, NUM_CONTEXT_TOKENS = "contexts", "num_context_tokens"
# Under this key each decision's counterpart with its instructions, where there is one, a list in their order.
TEACHERS = "teachers"
# What a collator may put into a batch for samples that have a context.
TOKEN_KEYS = {"input_ids", "labels", "attention_mask"}
# What a collator adds that flattens samples into one row.
FLATTENED_KEYS = {"position_ids", "cu_seq_lens_q", "seq_idx"}


@dataclass(frozen=True)
class BatchCutter:
    """Cuts collated batches.

    Attributes:
        cut: Where samples are cut.
        max_decisions: Decisions of a conversation's turns in one batch; None: no bound.
        pad_token_id: Token that fills the decisions' padding.
    """

    cut: Cut
    max_decisions: int | None
    pad_token_id: int

    def parts(self, inputs: Batch) -> list[Batch]:
        """Batches of decisions, of one batch of samples; the batch itself where there is nothing to cut.

        Args:
            inputs: What the collator made: `input_ids`, `labels` and `attention_mask` of shape `(samples, tokens)`.

        Returns:
            Where decisions have contexts, the batch also has `position_ids` of shape `(decisions, tokens)`, under
            `CONTEXTS` the context of each, and under `NUM_CONTEXT_TOKENS` the tokens that are in no decision.

        Raises:
            ValueError: The collator added something that cannot be cut, or put several samples into one row.
        """
        samples = self._samples(inputs)
        decisions = [decision for sample in samples for decision in sample]
        if self._stays(inputs, decisions):
            return [inputs]
        unknown = inputs.keys() - TOKEN_KEYS - {TEACHERS}
        if unknown and any(len(decision.context) for decision in decisions):
            raise ValueError(
                f"The collator put {', '.join(f'`{key}`' for key in sorted(unknown))} into a batch whose samples have "
                f"contexts; only {', '.join(f'`{key}`' for key in sorted(TOKEN_KEYS))} can be cut at a boundary. Use "
                "another `data_collator`, or train with `tier: 1`."
            )
        size = self.max_decisions or len(decisions)
        groups = [slice(start, start + size) for start in range(0, len(decisions), size)]
        parts = [{**inputs, **self._padded(decisions[group])} for group in groups]
        if TEACHERS in inputs:
            for part, group in zip(parts, groups, strict=True):
                part[TEACHERS] = inputs[TEACHERS][group]
        parts[0][NUM_CONTEXT_TOKENS] = sum(map(_num_context_tokens, samples))
        return parts

    def num_decisions(self, inputs: Batch) -> list[int] | None:
        """Decisions that each sample has in the parts of a batch; None where the batch itself is its only part."""
        samples = self._samples(inputs)
        decisions = [decision for sample in samples for decision in sample]
        return None if self._stays(inputs, decisions) else [len(sample) for sample in samples]

    def contexts(self, inputs: Batch) -> list[ContextTokens]:
        """Every context in a batch of samples."""
        return [decision.to_encode for sample in self._samples(inputs) for decision in sample if len(decision.context)]

    def _samples(self, inputs: Batch) -> list[list[Decision]]:
        """Decisions of each sample; none where there is nothing to cut."""
        cuts = self.cut.gradient_horizon != -1 or self.cut.max_context_length is not None
        if not cuts or "labels" not in inputs:
            return []
        if FLATTENED_KEYS & inputs.keys():
            _require_no_context(inputs)
            return []
        return cut_batch(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), self.cut)

    def _stays(self, inputs: Batch, decisions: list[Decision]) -> bool:
        """Whether the decisions are the samples, so that the batch can stay as the collator made it."""
        if not decisions:
            return True
        if any(len(decision.context) for decision in decisions):
            return False
        num_tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        return len(decisions) <= (self.max_decisions or len(decisions)) and num_tokens == sum(
            len(decision.input_ids) for decision in decisions
        )

    def _padded(self, decisions: list[Decision]) -> Batch:
        batch = pad_decisions(decisions, self.pad_token_id)
        part: Batch = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
        if batch.num_context_tokens:
            contexts = [decision.to_encode for decision in decisions]
            part |= {"position_ids": batch.position_ids, CONTEXTS: contexts}
        return part


def num_labels(batch: Batch) -> int:
    """Labels that a batch predicts."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def from_first_label(batch: Batch) -> tuple[Batch, int]:
    """A batch with its labels cut to those that a loss needs, and the first token whose output that loss needs.

    The tokens stay. Two labels are left where none is supervised, since losses compare each with the token before.
    """
    labels = batch.get("labels")
    if labels is None or "shift_labels" in batch:
        return batch, 0
    is_supervised = (labels[:, 1:] != IGNORED_LABEL).any(dim=0)
    first = int(is_supervised.nonzero()[0]) if bool(is_supervised.any()) else max(labels.shape[1] - 2, 0)
    return {**batch, "labels": labels[:, first:]}, first


def without_labels(batch: Batch) -> Batch:
    """Two tokens of a batch's first decision, without context and labels: a forward and backward that add nothing."""
    tokens = {name: batch[name][:1, :2] for name in ("input_ids", "attention_mask")}
    return {**tokens, "labels": torch.full_like(tokens["input_ids"], IGNORED_LABEL), CONTEXTS: []}


def _num_context_tokens(decisions: list[Decision]) -> int:
    """Tokens of a sample that are kept and belong to no decision; those that decisions share count once."""
    num_kept = max(len(decision.context) + len(decision.input_ids) for decision in decisions)
    return max(num_kept - sum(len(decision.input_ids) for decision in decisions), 0)


def _require_no_context(inputs: Batch) -> None:
    starts = inputs["position_ids"][0] == 0 if "position_ids" in inputs else None
    supervised = inputs["labels"][0] != IGNORED_LABEL
    if starts is not None and not bool(supervised[1:][~starts[1:] & starts[:-1]].all()):
        raise ValueError(
            "A flattened batch (`packing`, `padding_free` or a collator that does the same) holds a sample with a "
            "context, and contexts cannot be told apart there. Set both to False, or train with `tier: 1`."
        )
