# SPDX-License-Identifier: Apache-2.0
"""The frozen context: a read-only cache that decisions continue from.

How a layer of a transformers model uses a cache, and what a read-only layer answers:

1. Attention calls `update(keys, values)` and attends to what comes back. A read-only layer returns the context's
   keys and values with the new ones and stores nothing. The new ones keep their gradient; the context's are
   constants. Where attention can read two segments (see `segments`), only the new ones are returned and the
   context's ride along, so that no second copy of them is ever made.
2. Linear attention (Gated DeltaNet, Mamba-2, short convolutions) calls `get_conv_state`, `get_recurrent_state`,
   `update_conv_state` and `update_recurrent_state`. A read-only layer returns the context's state, and for the
   updates what the caller needs to go on, again without storing anything.

Because nothing is stored, running a layer twice gives the same result twice: recomputing it in the backward pass
(gradient checkpointing) is as legitimate as without a cache.

Samples in a batch are kept as separate rows, each of its own length and without padding, so that they can be shared
between batches. Towards the mask builders of transformers a batch looks like left-padded contexts of one common
length, the longest.

Shapes: B samples, H key/value heads, D decision tokens, E head dimension.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import DummyLayer

from frozen_peft.context.encoded import AttentionState, EncodedContext, LayerState, LinearState, StateKind
from frozen_peft.context.handover import Segment, give_segment, mark_frozen_length, note_update, uncompiled
from frozen_peft.context.read_only import ReadOnlyAttention, ReadOnlyCache, ReadOnlyLinear

__all__ = ["FrozenContext", "padded_pieces"]


class _FrozenAttention(ReadOnlyAttention):
    """Read-only attention layer over the rows of a batch."""

    def __init__(self, states: list[AttentionState], num_tokens: int, segmented: bool):
        num_kept = max(state.num_kept for state in states)
        ReadOnlyAttention.__init__(self, num_tokens, num_kept, states[0].sliding_window)
        self.attention_states, self.segmented = states, segmented

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The decision's keys and values, `(B, H, D, E)`, together with the context's. Nothing is stored."""
        note_update()
        keys = tuple(state.keys for state in self.attention_states)
        values = tuple(state.values for state in self.attention_states)
        if self.segmented:
            give_segment(key_states, value_states, Segment(keys, values, self.num_kept))
            return key_states, value_states
        key_states = torch.cat([padded_pieces(keys), key_states], dim=-2)
        value_states = torch.cat([padded_pieces(values), value_states], dim=-2)
        for tensor in (key_states, value_states):
            mark_frozen_length(tensor, self.num_kept)
        return key_states, value_states


class _FrozenLinear(ReadOnlyLinear):
    """Read-only linear-attention layer over the rows of a batch."""

    def __init__(self, states: list[LinearState]):
        conv, recurrent = states[0].conv, states[0].recurrent
        ReadOnlyLinear.__init__(self, 1 + max(*conv, *recurrent, 0, 0), conv, recurrent)
        self.linear_states = states

    @uncompiled
    def conv_state(self, state_idx: int) -> torch.Tensor | None:
        return _stacked([state.conv.get(state_idx) for state in self.linear_states])

    @uncompiled
    def recurrent_state(self, state_idx: int) -> torch.Tensor | None:
        return _stacked([state.recurrent.get(state_idx) for state in self.linear_states])

    @uncompiled
    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs: object) -> torch.Tensor:
        """The convolution's input after the context's last inputs, `(B, channels, kernel size + D)`."""
        if state_idx == 0:
            note_update()
        past = self.conv_state(state_idx)
        assert past is not None
        return torch.cat([past.to(conv_states.dtype), conv_states], dim=-1)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        return recurrent_states


class _FrozenHybrid(_FrozenLinear, _FrozenAttention):
    """Read-only layer of both kinds (Falcon-H1)."""

    def __init__(self, linear: list[LinearState], attention: list[AttentionState], num_tokens: int, segmented: bool):
        _FrozenAttention.__init__(self, attention, num_tokens, segmented)
        _FrozenLinear.__init__(self, linear)

    get_max_length = _FrozenAttention.get_max_length


def padded_pieces(rows: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Keys or values of several contexts as one batch, padded on the left with zeros, shape `(B, H, longest, E)`.

    Args:
        rows: Pieces of each context, oldest first, shapes `(1, H, tokens of the piece, E)`.
    """
    if len(rows) == 1:
        return rows[0][0] if len(rows[0]) == 1 else torch.cat(rows[0], dim=-2)
    longest = max(sum(piece.shape[-2] for piece in pieces) for pieces in rows)
    template = rows[0][0]
    batch = template.new_zeros(len(rows), template.shape[1], longest, template.shape[-1])
    for own, pieces in zip(batch, rows, strict=True):
        joined = torch.cat(pieces, dim=-2)[0]
        own[:, longest - joined.shape[-2] :] = joined
    return batch


def _stacked(rows: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Rows `(1, ...)` as one batch `(B, ...)`; a single row is not copied."""
    if any(row is None for row in rows):
        return None
    return rows[0] if len(rows) == 1 else torch.cat(rows)  # type: ignore[arg-type]


class FrozenContext(ReadOnlyCache):
    """A read-only cache of one or more encoded contexts, one row each.

    Pass it as the cache (see `as_cache_argument`) to a forward of the decisions inside `decision_forward(model)`. Any
    number of forwards may use it, in any order: its tensors never change.

    Args:
        rows: The contexts, at least one of them with tokens.
        segmented: The model's attention reads context and decision as two segments (see
            `use_segmented_attention`); otherwise keys and values are concatenated for each forward.
        rope_lengths: The rope length that each row was encoded with (see `rope`); empty: 0 for all.
    """

    def __init__(self, rows: list[EncodedContext], *, segmented: bool = False, rope_lengths: Sequence[int] = ()):
        if not any(row.num_tokens for row in rows):
            raise ValueError("A frozen context needs at least one sample with context tokens; all of them are empty.")
        self.rows = rows
        self.segmented = segmented
        self.rope_lengths = list(rope_lengths) or [0] * len(rows)
        template = next(row for row in rows if row.num_tokens)
        self._filled = [row if row.num_tokens else template.emptied() for row in rows]
        longest = max(row.num_tokens for row in rows)
        layers = [self._layer(index, longest) for index in range(len(template.layers))]
        super().__init__(layers=layers)

    def split(self, sizes: Sequence[int]) -> "list[FrozenContext]":
        """Its rows in parts of these sizes, each of which has a context with tokens."""
        if len(sizes) == 1:
            return [self]
        stops = list(itertools.accumulate(sizes))
        return [
            FrozenContext(
                self.rows[stop - size : stop],
                segmented=self.segmented,
                rope_lengths=self.rope_lengths[stop - size : stop],
            )
            for size, stop in zip(sizes, stops, strict=True)
        ]

    def _layer(self, index: int, num_tokens: int) -> ReadOnlyAttention | ReadOnlyLinear | DummyLayer:
        states = self.states(index)
        attention = [state.attention for state in states if state.attention is not None]
        linear = [state.linear for state in states if state.linear is not None]
        if attention and linear:
            return _FrozenHybrid(linear, attention, num_tokens, self.segmented)
        if attention:
            return _FrozenAttention(attention, num_tokens, self.segmented)
        return _FrozenLinear(linear) if linear else DummyLayer()

    def states(self, index: int) -> list[LayerState]:
        """What each row keeps of its context in one layer, one without tokens the states of having seen nothing."""
        return [row.layers[index] for row in self._filled]

    @property
    def lengths(self) -> list[int]:
        """Context tokens of each row."""
        return [row.num_tokens for row in self.rows]

    @property
    def num_states(self) -> int:
        """Layer states that a forward continues from: one per attention and one per convolution."""
        template = next(row for row in self.rows if row.num_tokens)
        attention = sum(layer.attention is not None for layer in template.layers)
        return attention + sum(layer.linear is not None and 0 in layer.linear.conv for layer in template.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states, counting a storage that rows share once."""
        storages = {}
        for row in self.rows:
            for tensor in row.tensors():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def select(self, indices: list[int]) -> "FrozenContext":
        """The rows of these indices, shared with this context."""
        return FrozenContext(
            [self.rows[index] for index in indices],
            segmented=self.segmented,
            rope_lengths=[self.rope_lengths[index] for index in indices],
        )

    def attention_mask(self, decision_mask: torch.Tensor) -> torch.Tensor:
        """Mask over left-padded contexts and decisions.

        Args:
            decision_mask: 1 on decision tokens, 0 on padding, shape `(B, D)`.

        Returns:
            Shape `(B, longest context + D)`, dtype and device of `decision_mask`.
        """
        lengths = torch.tensor(self.lengths, device=decision_mask.device)
        columns = torch.arange(int(lengths.max()), device=decision_mask.device)
        context_mask = columns[None, :] >= lengths.max() - lengths[:, None]
        return torch.cat([context_mask.to(decision_mask.dtype), decision_mask], dim=-1)

    def mutated(self, kind: StateKind, change: Callable[[torch.Tensor], torch.Tensor]) -> "FrozenContext":
        """A copy in which every state of one kind is replaced by `change(state)`.

        For checks that a lost or mixed-up state does not go unnoticed; this context stays as it is.
        """
        rows = [row.mutated(kind, change) for row in self.rows]
        return FrozenContext(rows, segmented=self.segmented, rope_lengths=self.rope_lengths)
