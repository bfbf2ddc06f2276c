# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin alike as one row, in which each is kept from where it leaves the one before it.

A conversation whose turns stand behind different renderings of it is such a row: what the renderings have in common is
in it once, and the prefix tree of their contexts (see `prefixes`) is found again from the whole sequences.
"""

from collections.abc import Sequence

import numpy as np
import torch

from frozen_peft.context.prefixes import num_shared

__all__ = ["BRANCHES", "fold_branches", "unfold_branches"]

# Column of a prepared dataset and key of a batch: of each sequence, the tokens that it begins with like the one before
# it, and the tokens of its own that are kept; one pair after the other.
BRANCHES = "branches"
_IGNORED_LABEL = -100


def fold_branches(sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> dict[str, list[int]]:
    """The row of some sequences.

    Args:
        sequences: Token ids of each.
        firsts: Where the supervised tokens of each begin, which reach to its end.

    Returns:
        `input_ids` and `labels` of the tokens that are kept, and `branches`.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    branches: list[int] = []
    before = np.zeros(0, dtype=np.int64)
    for sequence, first in zip(sequences, firsts, strict=True):
        tokens = np.asarray(sequence, dtype=np.int64)
        shared = num_shared(before, tokens[:first])
        input_ids += sequence[shared:]
        labels += [_IGNORED_LABEL] * (first - shared) + list(sequence[first:])
        branches += [shared, len(tokens) - shared]
        before = tokens
    return {"input_ids": input_ids, "labels": labels, BRANCHES: branches}


def unfold_branches(
    input_ids: torch.Tensor, labels: torch.Tensor, branches: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of each sequence, both shape `(its tokens,)`.

    Args:
        input_ids: Token ids of a row, shape `(tokens,)`, int64.
        labels: Labels of a row, shape `(tokens,)`, int64.
        branches: Shape `(2 * sequences,)`; sequences without tokens of their own are padding.

    Raises:
        ValueError: The numbers do not fit the tokens.
    """
    sequences: list[tuple[torch.Tensor, torch.Tensor]] = []
    before, start = input_ids[:0], 0
    pairs = branches.view(-1, 2).tolist()
    if (told := sum(own for _, own in pairs)) != len(input_ids):
        raise ValueError(
            f"`{BRANCHES}` tells of {told} tokens, and there are {len(input_ids)} `input_ids`. "
            "Leave the columns of a prepared dataset as they are."
        )
    for shared, own in pairs:
        if not own:
            continue
        if shared > len(before):
            raise ValueError(f"`{BRANCHES}` shares {shared} tokens with a sequence of {len(before)}.")
        stop = start + own
        before = torch.cat([before[:shared], input_ids[start:stop]])
        ignored = labels.new_full((shared,), _IGNORED_LABEL)
        sequences.append((before, torch.cat([ignored, labels[start:stop]])))
        start = stop
    return sequences
