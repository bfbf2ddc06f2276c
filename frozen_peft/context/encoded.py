# SPDX-License-Identifier: Apache-2.0
"""What an encoded context consists of: the state of each layer after its last token.

Keys and values of full attention are kept in pieces, one per extension: a context that extends another holds the
other's pieces, not a copy of them, and adds its own. The state of linear attention and the keys of a sliding window
are those after the last token, so every context has its own.

Shapes: H key/value heads, E head dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

__all__ = ["AttentionState", "EncodedContext", "LayerState", "LinearState", "StateKind"]

StateKind = Literal["keys_values", "conv", "recurrent"]


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of one context in one attention layer, in pieces, oldest first.

    Attributes:
        keys: Shapes `(1, H, tokens of the piece, E)`. A sliding-window layer has one piece, with the last
            `sliding_window - 1` tokens.
        values: Shapes `(1, H, tokens of the piece, value head dimension)`.
        sliding_window: Window of the layer in tokens, None for full attention.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    sliding_window: int | None = None

    @property
    def num_kept(self) -> int:
        """Tokens whose keys are kept."""
        return sum(piece.shape[-2] for piece in self.keys)


@dataclass(frozen=True)
class LinearState:
    """State of one context in one linear-attention layer; most have one of each kind, some no recurrent state.

    Attributes:
        conv: Last inputs of the short convolution by state index, shape `(1, channels, kernel size)` each.
        recurrent: Recurrent state by state index, shape `(1, value heads, key dim, value dim)` or as the
            architecture lays it out.
    """

    conv: dict[int, torch.Tensor]
    recurrent: dict[int, torch.Tensor]


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps of a context: attention state, linear-attention state, both or (an MLP layer) none."""

    attention: AttentionState | None = None
    linear: LinearState | None = None


class _Parts(NamedTuple):
    """Tensors of one layer: keys and values by kind, the others by state index."""

    attention: dict[str, torch.Tensor]
    conv: dict[int, torch.Tensor]
    recurrent: dict[int, torch.Tensor]


@dataclass(frozen=True)
class EncodedContext:
    """One encoded context: the unit that is stored and shared.

    Attributes:
        num_tokens: Tokens in the context.
        layers: One state per decoder layer; empty when the context has no tokens.
    """

    num_tokens: int
    layers: tuple[LayerState, ...]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor, pieces that are shared with other contexts included."""
        for layer in self.layers:
            if layer.attention is not None:
                yield from layer.attention.keys
                yield from layer.attention.values
            if layer.linear is not None:
                yield from layer.linear.conv.values()
                yield from layer.linear.recurrent.values()

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """What this context adds to the one it extends, by name: last pieces, and the states after the last token."""
        named = {}
        for index, layer in enumerate(self.layers):
            if layer.attention is not None:
                named[f"{index}.keys"] = layer.attention.keys[-1]
                named[f"{index}.values"] = layer.attention.values[-1]
            if layer.linear is not None:
                named |= {f"{index}.conv.{state}": tensor for state, tensor in layer.linear.conv.items()}
                named |= {f"{index}.recurrent.{state}": tensor for state, tensor in layer.linear.recurrent.items()}
        return named

    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer in tokens, None for any other layer."""
        return tuple(layer.attention.sliding_window if layer.attention is not None else None for layer in self.layers)

    @classmethod
    def from_own_tensors(
        cls,
        num_tokens: int,
        named: dict[str, torch.Tensor],
        windows: tuple[int | None, ...],
        prefix: "EncodedContext | None",
    ) -> "EncodedContext":
        """Puts a context together again.

        Args:
            num_tokens: Tokens in the context.
            named: What `own_tensors` gave.
            windows: What `windows` gave.
            prefix: The context that it extends.
        """
        parts: list[_Parts] = [_Parts({}, {}, {}) for _ in windows]
        for name, tensor in named.items():
            layer, kind, *state = name.split(".")
            if state:
                getattr(parts[int(layer)], kind)[int(state[0])] = tensor
            else:
                parts[int(layer)].attention[kind] = tensor
        layers = []
        for index, (window, part) in enumerate(zip(windows, parts, strict=True)):
            attention = None
            if part.attention:
                before = prefix.layers[index].attention if prefix is not None and window is None else None
                before = before or AttentionState((), ())
                keys, values = (*before.keys, part.attention["keys"]), (*before.values, part.attention["values"])
                attention = AttentionState(keys, values, window)
            linear = LinearState(part.conv, part.recurrent) if part.conv or part.recurrent else None
            layers.append(LayerState(attention, linear))
        return cls(num_tokens, tuple(layers))

    def emptied(self) -> "EncodedContext":
        """The states of a model that has seen nothing: no keys, and linear-attention states of zeros."""
        layers = []
        for state in self.layers:
            attention, linear = state.attention, state.linear
            if attention is not None:
                keys, values = (pieces[-1][..., :0, :] for pieces in (attention.keys, attention.values))
                attention = replace(attention, keys=(keys,), values=(values,))
            if linear is not None:
                linear = LinearState(
                    {index: torch.zeros_like(s) for index, s in linear.conv.items()},
                    {index: torch.zeros_like(s) for index, s in linear.recurrent.items()},
                )
            layers.append(LayerState(attention, linear))
        return EncodedContext(0, tuple(layers))

    def mutated(self, kind: StateKind, change: Callable[[torch.Tensor], torch.Tensor]) -> "EncodedContext":
        """A copy in which every tensor of one kind is replaced by `change(tensor)`; see `FrozenContext.mutated`."""
        layers = []
        for state in self.layers:
            attention, linear = state.attention, state.linear
            if attention is not None and kind == "keys_values":
                keys, values = (tuple(map(change, pieces)) for pieces in (attention.keys, attention.values))
                attention = replace(attention, keys=keys, values=values)
            if linear is not None and kind == "conv":
                linear = replace(linear, conv={i: change(s) for i, s in linear.conv.items()})
            if linear is not None and kind == "recurrent":
                linear = replace(linear, recurrent={i: change(s) for i, s in linear.recurrent.items()})
            layers.append(LayerState(attention, linear))
        return EncodedContext(self.num_tokens, tuple(layers))
