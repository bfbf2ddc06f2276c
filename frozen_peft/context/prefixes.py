# SPDX-License-Identifier: Apache-2.0
"""Where contexts are cut, so that what several of them begin with is encoded once.

Contexts that are known together form a tree: two of them share a path as long as their tokens agree. A context is cut
at its end and wherever another one ends or branches off; between two cuts it is encoded in one go. A linear-attention
state exists only where a prefill stopped, so nothing can be shared up to any other place.
"""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from frozen_peft.context.keys import PrefixKey, prefix_keys

__all__ = ["PrefixPlan", "num_shared", "token_order"]

# Contexts that branch off earlier than this share nothing: an extra forward would cost more than it saves.
MIN_SHARED_TOKENS = 16


class PrefixPlan:
    """The cuts of contexts that are known together, and which of them are still to come.

    Args:
        contexts: Token ids of each context, shape `(tokens,)`, int64; empty ones are left out, equal ones count twice.
        rope_lengths: The rope length of each (see `rope`); contexts of different ones share nothing. Empty: 0 for all.
        can_extend: Contexts may be cut; otherwise only equal ones share.
    """

    def __init__(self, contexts: Sequence[np.ndarray], rope_lengths: Sequence[int] = (), *, can_extend: bool = True):
        self._cuts: dict[PrefixKey, tuple[PrefixKey, ...]] = {}
        self._num_to_come: Counter[PrefixKey] = Counter()
        by_rope: dict[int, list[np.ndarray]] = {}
        for context, rope_length in zip(contexts, rope_lengths or [0] * len(contexts), strict=True):
            if len(context):
                by_rope.setdefault(rope_length, []).append(context)
        for rope_length, members in by_rope.items():
            self._add(members, rope_length, can_extend)

    def _add(self, contexts: Sequence[np.ndarray], rope_length: int, can_extend: bool) -> None:
        lengths = _cut_lengths(contexts) if can_extend else [{len(context)} for context in contexts]
        for context, cuts in zip(contexts, lengths, strict=True):
            keys = prefix_keys(context, cuts, rope_length=rope_length)
            ordered = tuple(keys[length] for length in sorted(cuts))
            self._cuts[ordered[-1]] = ordered
            self._num_to_come.update(ordered)

    def __contains__(self, context: PrefixKey) -> bool:
        return context in self._cuts and self._num_to_come[context] > 0

    def cuts(self, context: PrefixKey) -> tuple[PrefixKey, ...]:
        """Prefixes at which a context is cut, shortest first; the last is the context itself."""
        return self._cuts[context]

    def finish(self, context: PrefixKey) -> None:
        """Notes that a context has come."""
        self._num_to_come.subtract(self._cuts[context])

    def is_to_come(self, prefix: PrefixKey) -> bool:
        """Whether a context that is still to come is cut at this prefix."""
        return self._num_to_come[prefix] > 0


def token_order(tokens: np.ndarray) -> bytes:
    """Sorts contexts as their tokens do, so that those that begin alike come together."""
    # Big-endian bytes have the order of the tokens, which are no more than 2^31.
    return tokens.astype(">i4").tobytes()


def _cut_lengths(contexts: Sequence[np.ndarray]) -> list[set[int]]:
    """Lengths at which each context is cut.

    In the order of their tokens, the prefix that two contexts share is the shortest of those that the neighbours
    between them share.
    """
    order = sorted(range(len(contexts)), key=lambda index: token_order(contexts[index]))
    ordered = [contexts[index] for index in order]
    shared = [num_shared(left, right) for left, right in itertools.pairwise(ordered)]
    lengths = [len(context) for context in ordered]
    before = _branches(lengths, shared)
    after = _branches(lengths[::-1], shared[::-1])[::-1]
    cuts: list[set[int]] = [set()] * len(contexts)
    for place, index in enumerate(order):
        cuts[index] = {lengths[place]} | before[place] | after[place]
    return cuts


def _branches(lengths: Sequence[int], shared: Sequence[int]) -> list[set[int]]:
    """Lengths at which each context is cut on account of those before it, given what neighbours share.

    What a context shares with those before it falls the farther they are, so one stack holds the different numbers,
    each with whether a context ends there.
    """
    branches: list[set[int]] = [set()]
    stack: list[tuple[int, bool]] = []
    for length, common in zip(lengths, shared, strict=False):
        ends = common == length
        while stack and stack[-1][0] >= common:
            number, is_end = stack.pop()
            ends |= is_end and number == common
        if common:
            stack.append((common, ends))
        branches.append({number for number, is_end in stack if is_end or number >= MIN_SHARED_TOKENS})
    return branches


def num_shared(left: np.ndarray, right: np.ndarray) -> int:
    """Tokens that two contexts begin with alike."""
    length = min(len(left), len(right))
    different = left[:length] != right[:length]
    return int(different.argmax()) if different.any() else length
