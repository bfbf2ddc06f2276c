# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer has before a stretch of the sequence, and what it leaves behind.

Shapes: B samples, H key/value heads, P tokens of a piece, E head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from frozen_peft.context.encoded import AttentionState
from frozen_peft.context.handover import KeyValueGradient
from frozen_peft.errors import UnsupportedArchitectureError

__all__ = ["LayerEnd", "LayerKind", "LayerPast", "LinearStates", "Piece", "layer_kinds"]


@dataclass(frozen=True)
class LayerKind:
    """What a decoder layer keeps of the tokens before it.

    Attributes:
        attends: It keeps keys and values.
        sliding_window: Window of its attention in tokens, None for full attention.
        num_linear_states: Linear-attention states that it keeps.
    """

    attends: bool = False
    sliding_window: int | None = None
    num_linear_states: int = 0


LAYER_TYPES = {
    DynamicLayer: (True, False),
    DynamicSlidingWindowLayer: (True, False),
    LinearAttentionLayer: (False, True),
    LinearAttentionAndFullAttentionLayer: (True, True),
    LinearAttentionAndSlidingWindowAttentionLayer: (True, True),
    DummyLayer: (False, False),
}


def layer_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """The kind of each decoder layer, by the cache that transformers would make for it.

    Raises:
        UnsupportedArchitectureError: A layer keeps something that stretches cannot hand on.
    """
    kinds = []
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in LAYER_TYPES:
            raise UnsupportedArchitectureError(
                f"`{model.config.model_type}` has layers with a `{type(layer).__name__}`, which stretches of a "
                "sequence cannot hand on. Leave `sequence_chunk_size` out, or use another architecture."
            )
        attends, is_linear = LAYER_TYPES[type(layer)]
        window = getattr(layer, "sliding_window", None) if attends else None
        kinds.append(LayerKind(attends, window, layer.number_of_states if is_linear else 0))
    return kinds


@dataclass
class Piece:
    """Keys and values that one stretch produced in one layer, and the gradient that later stretches give them.

    Attributes:
        keys: Shape `(B, H, P, E)`.
        values: Shape `(B, H, P, value head dimension)`.
        gradient: Of keys and values, in float32 or more, on their device; None as long as there is none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    gradient: KeyValueGradient | None = None

    def add_gradient_to(self) -> KeyValueGradient:
        """The gradient so far, zeros to begin with."""
        if self.gradient is None:
            dtype = torch.promote_types(self.keys.dtype, torch.float32)
            self.gradient = torch.zeros_like(self.keys, dtype=dtype), torch.zeros_like(self.values, dtype=dtype)
        return self.gradient

    def last(self, num_tokens: int) -> "Piece":
        """A view of the last tokens, with the same gradient."""
        if num_tokens >= self.keys.shape[-2]:
            return self
        return _PieceEnd(self, num_tokens)


class _PieceEnd(Piece):
    """The last tokens of a piece."""

    def __init__(self, piece: Piece, num_tokens: int):
        super().__init__(piece.keys[..., -num_tokens:, :], piece.values[..., -num_tokens:, :])
        self.piece, self.num_tokens = piece, num_tokens

    def add_gradient_to(self) -> KeyValueGradient:
        keys, values = self.piece.add_gradient_to()
        return keys[..., -self.num_tokens :, :], values[..., -self.num_tokens :, :]


@dataclass
class LinearStates:
    """States of a linear-attention layer between two stretches, by state index.

    Attributes:
        conv: Last inputs of the short convolution, shape `(B, channels, kernel size)` each.
        recurrent: Recurrent state, shape `(B, value heads, key dim, value dim)` or as the architecture has it.
    """

    conv: dict[int, torch.Tensor] = field(default_factory=dict)
    recurrent: dict[int, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> list[torch.Tensor]:
        """All states, in an order that depends on their indices only."""
        return [kind[index] for kind in (self.conv, self.recurrent) for index in sorted(kind)]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LinearStates":
        """Every state changed alike."""
        conv, recurrent = (
            {index: change(state) for index, state in kind.items()} for kind in (self.conv, self.recurrent)
        )
        return LinearStates(conv, recurrent)


@dataclass
class LayerPast:
    """What lies before a stretch in one layer.

    Attributes:
        pieces: Keys and values of the stretches before it, oldest first; for a sliding window only what it sees.
        frozen: Constant keys and values of the samples' frozen contexts before those; empty where there are none to
            be seen.
        linear: States that linear attention starts from; empty at the beginning of a sequence.
    """

    pieces: list[Piece] = field(default_factory=list)
    frozen: Sequence[AttentionState] = ()
    linear: LinearStates = field(default_factory=LinearStates)

    @property
    def num_frozen(self) -> int:
        return max((state.num_kept for state in self.frozen), default=0)

    @property
    def num_kept(self) -> int:
        """Columns that a mask has before the stretch."""
        return self.num_frozen + sum(piece.keys.shape[-2] for piece in self.pieces)


@dataclass
class LayerEnd:
    """What a stretch leaves behind in one layer: its own keys and values, and the linear-attention states."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    linear: LinearStates = field(default_factory=LinearStates)
