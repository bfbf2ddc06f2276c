# SPDX-License-Identifier: Apache-2.0
"""How a cache layer hands the frozen context to the attention function behind it.

The modeling code between the two passes on whatever `Cache.update` returned, so the context rides along as an
attribute of the returned tensor. Modeling code that computes something new from the keys loses it; forwards
therefore count what was given and what was read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

__all__ = [
    "CONTIGUOUS",
    "Segment",
    "SegmentedForward",
    "current_forward",
    "frozen_length",
    "get_segment",
    "give_segment",
    "mark_contiguous",
    "mark_frozen_length",
    "segmented_forward",
]

SEGMENT_ATTRIBUTE = "_frozen_peft_segment"
FROZEN_LENGTH_ATTRIBUTE = "_frozen_peft_length"
# Marks prefill keys: the context so far with the chunk, contiguous, the chunk's queries at the end.
CONTIGUOUS = object()


@dataclass(frozen=True)
class Segment:
    """The frozen part of what a layer's decision attends to, one entry per sample and without padding.

    Attributes:
        keys: Shapes `(1, key/value heads, kept tokens, head dim)`.
        values: Shapes `(1, key/value heads, kept tokens, value head dim)`.
        padded_length: Context columns that a mask for this layer has.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    padded_length: int


@dataclass
class SegmentedForward:
    """Counts, in one forward, the segments given by the cache and those read by attention."""

    num_given: int = 0
    num_read: int = 0


_forward: ContextVar[SegmentedForward | None] = ContextVar("frozen_peft_segmented_forward", default=None)


@contextmanager
def segmented_forward() -> Iterator[SegmentedForward]:
    """A forward in which attention knows the segments, so that plain causal masks may be left out."""
    record = SegmentedForward()
    token = _forward.set(record)
    try:
        yield record
    finally:
        _forward.reset(token)


def current_forward() -> SegmentedForward | None:
    """The record of the segmented forward that is running, None outside of one."""
    return _forward.get()


def give_segment(key_states: torch.Tensor, segment: Segment) -> None:
    """Attaches the context's part to the decision's keys."""
    setattr(key_states, SEGMENT_ATTRIBUTE, segment)
    if (record := _forward.get()) is not None:
        record.num_given += 1


def mark_contiguous(key_states: torch.Tensor) -> None:
    """Notes that the last queries of a sequence will meet these keys, which are all keys up to them."""
    setattr(key_states, SEGMENT_ATTRIBUTE, CONTIGUOUS)


def get_segment(key_states: torch.Tensor) -> object | None:
    """The `Segment` that rides on these keys, `CONTIGUOUS`, or None."""
    return getattr(key_states, SEGMENT_ATTRIBUTE, None)


def mark_frozen_length(states: torch.Tensor, length: int) -> None:
    """Notes that the first `length` positions of concatenated states are the context's."""
    setattr(states, FROZEN_LENGTH_ATTRIBUTE, length)


def frozen_length(states: torch.Tensor) -> int:
    """How many positions at the beginning of these states are the context's."""
    return getattr(states, FROZEN_LENGTH_ATTRIBUTE, 0)
