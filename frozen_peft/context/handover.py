# SPDX-License-Identifier: Apache-2.0
"""How a cache layer hands the frozen context to the attention function behind it.

The modeling code between the two passes on whatever `Cache.update` returned, so the context rides along as an
attribute of the returned tensor. Modeling code that computes something new from the keys loses it; forwards
therefore count what was given and what was read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from frozen_peft.errors import ContextMismatchError

__all__ = [
    "CONTIGUOUS",
    "CacheUse",
    "KeyValueGradient",
    "Segment",
    "counted_forward",
    "current_use",
    "frozen_length",
    "get_segment",
    "give_segment",
    "is_counted",
    "mark_contiguous",
    "mark_frozen_length",
    "move_segment",
    "note_update",
    "require_all_read",
    "uncompiled",
]

Function = TypeVar("Function", bound=Callable[..., Any])

SEGMENT_ATTRIBUTE = "_frozen_peft_segment"
FROZEN_LENGTH_ATTRIBUTE = "_frozen_peft_length"
KeyValueGradient = tuple[torch.Tensor, torch.Tensor]
# Marks prefill keys: the context so far with the chunk, contiguous, the chunk's queries at the end.
CONTIGUOUS = object()


@dataclass(frozen=True)
class Segment:
    """What a layer attends to before the tokens at hand: per sample its pieces, oldest first, without padding.

    Attributes:
        keys: Shapes `(1, key/value heads, tokens of the piece, head dim)`.
        values: Shapes `(1, key/value heads, tokens of the piece, value head dim)`.
        padded_length: Columns that a mask for this layer has before the tokens at hand.
        gradients: Gradient of each piece's keys and values, which the backward pass adds to, in float32 or more; None
            for a piece that is constant. Without any (the default), all pieces are constants.
        expand: Makes keys and values of any part of the tokens of a piece, where `keys` and `values` are what a model
            keeps in their place (see `latents`); None: they are keys and values.
    """

    keys: tuple[tuple[torch.Tensor, ...], ...]
    values: tuple[tuple[torch.Tensor, ...], ...]
    padded_length: int
    gradients: tuple[tuple[KeyValueGradient | None, ...], ...] = ()
    expand: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def num_tokens(self, row: int) -> int:
        """Tokens of one sample."""
        return sum(piece.shape[-2] for piece in self.keys[row])


@dataclass
class CacheUse:
    """Counts, in one or more forwards, what layers did with their cache.

    Attributes:
        segmented: Attention reads segments, so plain causal masks may be left out.
        num_expected: Layer states that the forwards were to continue from.
        num_updated: Layer states that they did continue from.
        num_given: Segments given by the cache.
        num_read: Segments read by attention.
        decoder: Whose decisions are counted; None: something else is.
        outer: What counts the forwards around these.
    """

    segmented: bool
    num_expected: int = 0
    num_updated: int = 0
    num_given: int = 0
    num_read: int = 0
    decoder: torch.nn.Module | None = None
    outer: "CacheUse | None" = None


_use: ContextVar[CacheUse | None] = ContextVar("frozen_peft_cache_use", default=None)


@contextmanager
def counted_forward(segmented: bool, decoder: torch.nn.Module | None = None) -> Iterator[CacheUse]:
    """Counts the use of caches in the forwards inside."""
    use = CacheUse(segmented, decoder=decoder, outer=_use.get())
    token = _use.set(use)
    try:
        yield use
    finally:
        _use.reset(token)


def current_use() -> CacheUse | None:
    """The counts of the forward that is running, None outside of one."""
    return _use.get()


def is_counted(decoder: torch.nn.Module) -> bool:
    """Whether a decoder's decisions are being counted."""
    use = _use.get()
    while use is not None and use.decoder is not decoder:
        use = use.outer
    return use is not None


def note_update() -> None:
    """Counts a layer state that a layer continues from."""
    if (use := _use.get()) is not None:
        use.num_updated += 1


def require_all_read(use: CacheUse, model_type: str) -> None:
    """Makes a context that got lost on its way an error.

    Layers that run again in a backward pass count twice, so more than expected is no error.

    Raises:
        ContextMismatchError: A layer did not continue from its state, or attention did not read its segment.
    """
    ways_out = "Train it with `tier: 1`, without gradient checkpointing, or use another architecture."
    if use.num_updated < use.num_expected:
        raise ContextMismatchError(
            f"`{model_type}` dropped its frozen context: {use.num_updated} of {use.num_expected} layer states were "
            f"continued from. {ways_out}"
        )
    if use.num_read < use.num_given:
        raise ContextMismatchError(
            f"The attention of `{model_type}` read {use.num_read} of {use.num_given} frozen segments: it does not "
            "hand the cache's keys to transformers' AttentionInterface as they are. Load the model with "
            f"`attn_implementation='eager'`. {ways_out}"
        )


def uncompiled(function: Function) -> Function:
    """Marks a function that a compiled module (see `compiled`) calls as it is."""
    return torch.compiler.disable(function)


def give_segment(key_states: torch.Tensor, value_states: torch.Tensor, segment: Segment) -> None:
    """Attaches the context's part to the decision's keys and values."""
    move_segment(key_states, value_states, segment)
    if (use := _use.get()) is not None:
        use.num_given += 1


def move_segment(key_states: torch.Tensor, value_states: torch.Tensor, segment: Segment) -> None:
    """Attaches a segment that was given with other tensors to the keys and values that were made of those."""
    for states in (key_states, value_states):
        setattr(states, SEGMENT_ATTRIBUTE, segment)


def mark_contiguous(key_states: torch.Tensor) -> None:
    """Notes that the last queries of a sequence will meet these keys, which are all keys up to them."""
    setattr(key_states, SEGMENT_ATTRIBUTE, CONTIGUOUS)


def get_segment(states: torch.Tensor) -> object | None:
    """The `Segment` that rides on these keys or values, `CONTIGUOUS` (on keys alone), or None."""
    return getattr(states, SEGMENT_ATTRIBUTE, None)


def mark_frozen_length(states: torch.Tensor, length: int) -> None:
    """Notes that the first `length` positions of concatenated states are the context's."""
    setattr(states, FROZEN_LENGTH_ATTRIBUTE, length)


def frozen_length(states: torch.Tensor) -> int:
    """How many positions at the beginning of these states are the context's."""
    return getattr(states, FROZEN_LENGTH_ATTRIBUTE, 0)
