# SPDX-License-Identifier: Apache-2.0
"""Where a sample is cut in two: the context before the boundary, the decision from it on.

Shapes in this module: B samples in the batch, S tokens in a row as the collator padded it, D tokens in the
longest decision of the batch.
"""

from dataclasses import dataclass

import torch

__all__ = ["SplitBatch", "find_boundary", "split_batch"]

IGNORED_LABEL = -100
# A decision of one token would run the fused recurrent kernels, which write their state in place and have no
# backward; two tokens run the chunked ones.
MIN_DECISION_TOKENS = 2


def find_boundary(labels: torch.Tensor) -> int:
    """Index of a sample's first decision token.

    That is the token before the first supervised label, because its output predicts that label; tokens before it
    only set the scene.

    Args:
        labels: Labels of one sample without padding, shape `(tokens,)`, -100 where nothing is supervised.

    Returns:
        The number of context tokens, 0 when the first or second label is supervised already.

    Raises:
        ValueError: No label is supervised.
    """
    supervised = (labels != IGNORED_LABEL).nonzero()
    if len(supervised) == 0:
        raise ValueError(
            f"`labels` has no supervised label: all {len(labels)} are {IGNORED_LABEL}, so there is no decision to "
            "train. Drop the sample, or check `completion_only_loss`, `assistant_only_loss` and the chat template."
        )
    return max(int(supervised[0]) - 1, 0)


@dataclass(frozen=True)
class SplitBatch:
    """A batch cut at its boundaries: ragged contexts, and decisions padded on the right.

    Attributes:
        contexts: One tensor of token ids of shape `(context tokens,)` per sample, possibly empty, int64.
        input_ids: Decision tokens, shape `(B, D)`, int64.
        labels: Decision labels, shape `(B, D)`, int64, -100 where nothing is supervised.
        attention_mask: 1 on decision tokens and 0 on padding, shape `(B, D)`, int64.
        position_ids: Positions counted from the start of each sample's (kept) context, shape `(B, D)`, int64.
    """

    contexts: list[torch.Tensor]
    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor

    @property
    def num_context_tokens(self) -> int:
        return sum(len(context) for context in self.contexts)


def split_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    gradient_horizon: int = 0,
    max_context_length: int | None = None,
    pad_token_id: int = 0,
) -> SplitBatch:
    """Cuts a padded batch at each sample's boundary.

    Args:
        input_ids: Token ids, shape `(B, S)`, padded on either side.
        labels: Labels, shape `(B, S)`. A row without any supervised label contributes no loss and keeps no context.
        attention_mask: 1 on tokens and 0 on padding, shape `(B, S)`; None means no padding.
        gradient_horizon: Context tokens just before the decision that are kept with it, so that they carry
            gradient; -1 keeps them all.
        max_context_length: Keep only this many context tokens, dropping the oldest.
        pad_token_id: Token that fills the decisions' padding.

    Returns:
        The contexts and the padded decisions, on the device of `input_ids`.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    contexts, decisions, decision_labels = [], [], []
    for row_ids, row_labels, row_mask in zip(input_ids, labels, attention_mask.bool(), strict=True):
        row_ids, row_labels = row_ids[row_mask], row_labels[row_mask]
        boundary = find_boundary(row_labels) if bool((row_labels != IGNORED_LABEL).any()) else 0
        oldest = 0 if max_context_length is None else max(boundary - max_context_length, 0)
        cut = oldest if gradient_horizon == -1 else max(boundary - gradient_horizon, oldest)
        contexts.append(row_ids[oldest:cut])
        decisions.append(row_ids[cut:])
        decision_labels.append(row_labels[cut:])

    num_rows, width = len(decisions), max(MIN_DECISION_TOKENS, *map(len, decisions))
    padded_ids = input_ids.new_full((num_rows, width), pad_token_id)
    padded_labels = labels.new_full((num_rows, width), IGNORED_LABEL)
    padded_mask = attention_mask.new_zeros((num_rows, width))
    for row, (decision, row_labels) in enumerate(zip(decisions, decision_labels, strict=True)):
        padded_ids[row, : len(decision)] = decision
        padded_labels[row, : len(decision)] = row_labels
        padded_mask[row, : len(decision)] = 1
    lengths = torch.tensor([len(context) for context in contexts], device=input_ids.device)
    position_ids = lengths[:, None] + torch.arange(width, device=input_ids.device)[None, :]
    return SplitBatch(contexts, padded_ids, padded_labels, padded_mask, position_ids)
