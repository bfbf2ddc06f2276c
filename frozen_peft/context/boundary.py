# SPDX-License-Identifier: Apache-2.0
"""Where a sample is cut: the context before a boundary, the decision from it on.

Shapes in this module: B samples in the batch, S tokens in a row as the collator padded it, N decisions, D tokens in
the longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from frozen_peft.context.branches import unfold_branches
from frozen_peft.context.start import NO_START, ContextStart

__all__ = [
    "TAIL",
    "ContextTokens",
    "Cut",
    "Decision",
    "DecisionMode",
    "SplitBatch",
    "cut_batch",
    "decision_spans",
    "decision_start",
    "pad_decisions",
]

DecisionMode = Literal["tail", "turns"]
IGNORED_LABEL = -100
# A decision of one token would run the fused recurrent kernels, which write their state in place and have no
# backward; two tokens run the chunked ones.
MIN_DECISION_TOKENS = 2


@dataclass(frozen=True)
class Cut:
    """How samples are cut.

    Attributes:
        mode: `"tail"`: everything from the first supervised label on is one decision. `"turns"`: each run of
            supervised labels is a decision, and everything before it its context.
        gradient_horizon: Context tokens just before a decision that are kept with it, so that they carry gradient;
            -1 keeps them all.
        max_context_length: Keep only this many context tokens, dropping the oldest.
        max_length: Keep only this many tokens of context and decision together, dropping the oldest of the context.
        start: What stays of a context's beginning, where older tokens than the latest are dropped; it counts.
        invocation: Tokens that every decision begins with; empty: it begins with the token that predicts its first
            label.
    """

    mode: DecisionMode = "tail"
    gradient_horizon: int = 0
    max_context_length: int | None = None
    max_length: int | None = None
    invocation: tuple[int, ...] = ()
    start: ContextStart = NO_START

    def num_excess(self, boundary: int, stop: int) -> int:
        """Context tokens too many of a decision with so many before it, which ends at `stop`; 0: none."""
        limits = ((boundary, self.max_context_length), (stop, self.max_length))
        return max(max(length - limit, 0) if limit is not None else 0 for length, limit in limits)

    def kept(self, context: np.ndarray, num_excess: int) -> np.ndarray:
        """What stays of a context `(tokens,)` that has so many tokens too many: its start, and the latest."""
        if not num_excess:
            return context
        start = self.start.length(context)
        return np.concatenate([context[:start], context[min(start + num_excess, len(context)) :]])


TAIL = Cut()


@dataclass(frozen=True)
class ContextTokens:
    """A context to encode, of a sample whose length is known.

    Attributes:
        tokens: Token ids, shape `(context tokens,)`, possibly empty, int64.
        num_sample_tokens: Tokens of context and decision together, which the rope of some models follows (see `rope`).
    """

    tokens: torch.Tensor
    num_sample_tokens: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Decision:
    """One decision and its context, without padding.

    Attributes:
        context: Token ids, shape `(context tokens,)`, possibly empty, int64.
        input_ids: Token ids, shape `(decision tokens,)`, int64.
        labels: Labels, shape `(decision tokens,)`, int64, -100 where nothing is supervised.
        is_written: The model wrote it while it was trained, so that it will not come again.
    """

    context: torch.Tensor
    input_ids: torch.Tensor
    labels: torch.Tensor
    is_written: bool = False

    @property
    def to_encode(self) -> ContextTokens:
        """The context, with the length of the sample."""
        return ContextTokens(self.context, len(self.context) + len(self.input_ids))

    def to(self, device: torch.device | str) -> "Decision":
        """The same on a device."""
        return replace(
            self,
            context=self.context.to(device),
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
        )


@dataclass(frozen=True)
class SplitBatch:
    """Decisions padded on the right, and their ragged contexts.

    Attributes:
        contexts: One tensor of token ids of shape `(context tokens,)` per decision, possibly empty, int64.
        input_ids: Decision tokens, shape `(N, D)`, int64.
        labels: Decision labels, shape `(N, D)`, int64, -100 where nothing is supervised.
        attention_mask: 1 on decision tokens and 0 on padding, shape `(N, D)`, int64.
        position_ids: Positions counted from the start of each (kept) context, shape `(N, D)`, int64.
    """

    contexts: list[torch.Tensor]
    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor

    @property
    def num_context_tokens(self) -> int:
        return sum(len(context) for context in self.contexts)


def cut_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cut: Cut,
    branches: torch.Tensor | None = None,
) -> list[list[Decision]]:
    """Cuts a padded batch at each sample's boundaries.

    Args:
        input_ids: Token ids, shape `(B, S)`, padded on either side.
        labels: Labels, shape `(B, S)`. A row in which no label is predicted is one decision without context.
        attention_mask: 1 on tokens and 0 on padding, shape `(B, S)`; None means no padding.
        cut: Where to cut.
        branches: Of each row, where it holds branches (see `branches`), shape `(B, 2 * branches)`.

    Returns:
        The decisions of each sample, in their order.

    Raises:
        ValueError: A decision does not begin with the invocation tokens, or contains them again.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    rows = [
        (row_ids[mask], row_labels[mask])
        for row_ids, row_labels, mask in zip(input_ids, labels, attention_mask.bool(), strict=True)
    ]
    if branches is None:
        return [_cut_sample(*row, cut) for row in rows]
    return [
        [decision for sequence in unfold_branches(*row, own) for decision in _cut_sample(*sequence, cut)]
        for row, own in zip(rows, branches, strict=True)
    ]


def pad_decisions(decisions: Sequence[Decision], pad_token_id: int = 0) -> SplitBatch:
    """Puts decisions into one batch, at least two tokens wide, whose padding is `pad_token_id`."""
    template = decisions[0]
    num_rows, width = len(decisions), max(MIN_DECISION_TOKENS, *(len(decision.input_ids) for decision in decisions))
    input_ids = template.input_ids.new_full((num_rows, width), pad_token_id)
    labels = template.labels.new_full((num_rows, width), IGNORED_LABEL)
    mask = template.input_ids.new_zeros((num_rows, width))
    for row, decision in enumerate(decisions):
        length = len(decision.input_ids)
        input_ids[row, :length] = decision.input_ids
        labels[row, :length] = decision.labels
        mask[row, :length] = 1
    lengths = torch.tensor([len(decision.context) for decision in decisions], device=input_ids.device)
    position_ids = lengths[:, None] + torch.arange(width, device=input_ids.device)[None, :]
    return SplitBatch([decision.context for decision in decisions], input_ids, labels, mask, position_ids)


def _cut_sample(input_ids: torch.Tensor, labels: torch.Tensor, cut: Cut) -> list[Decision]:
    """Decisions of one sample without padding, both shape `(tokens,)`."""
    decisions = []
    for first, stop in decision_spans(labels, cut.mode):
        boundary = decision_start(input_ids, first, stop, cut.invocation)
        context = input_ids[:boundary]
        if excess := cut.num_excess(boundary, stop):
            context = torch.from_numpy(cut.kept(context.cpu().numpy(), excess)).to(context.device)
        horizon = len(context) if cut.gradient_horizon == -1 else min(cut.gradient_horizon, len(context))
        frozen, graded = context[: len(context) - horizon], context[len(context) - horizon :]
        own_labels = torch.cat([labels.new_full((horizon,), IGNORED_LABEL), labels[boundary:stop]])
        own_labels[: horizon + first - boundary] = IGNORED_LABEL
        decisions.append(Decision(frozen, torch.cat([graded, input_ids[boundary:stop]]), own_labels))
    return decisions or [Decision(input_ids[:0], input_ids, labels)]


def decision_spans(labels: torch.Tensor, mode: DecisionMode) -> list[tuple[int, int]]:
    """First label and end of each decision; a first token's label is predicted by nothing and begins none."""
    supervised = labels != IGNORED_LABEL
    if mode == "tail":
        firsts = supervised.nonzero()
        return [(int(firsts[0]), len(labels))] if len(firsts) else []
    padded = torch.nn.functional.pad(supervised.int(), (1, 1))
    starts, stops = ((padded.diff() == change).nonzero()[:, 0].tolist() for change in (1, -1))
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop > 1]


def decision_start(input_ids: torch.Tensor, first: int, stop: int, invocation: tuple[int, ...]) -> int:
    """Where the decision begins whose first label is at `first`: the number of its context tokens.

    Raises:
        ValueError: It does not begin with the invocation tokens, or contains them again.
    """
    if not invocation:
        return max(first - 1, 0)
    boundary = first - len(invocation)
    found = input_ids[max(boundary, 0) : first].tolist()
    if found != list(invocation):
        raise ValueError(
            f"A decision begins with the tokens {found}, and `context_adapters=False` needs it to begin with the "
            f"invocation tokens {list(invocation)}, where the adapter is switched on. Set `invocation` to the text "
            "just before every supervised span, or `context_adapters=True`."
        )
    rest = input_ids[boundary + 1 : stop]
    if len(rest) >= len(invocation):
        windows = rest.unfold(0, len(invocation), 1)
        if bool((windows == torch.tensor(invocation, device=rest.device)).all(-1).any()):
            raise ValueError(
                "A decision contains the invocation tokens again, and an activated adapter is switched on at their "
                "last occurrence only. Set `decision_mode='turns'` if it holds several turns, or "
                "`context_adapters=True`."
            )
    return boundary
