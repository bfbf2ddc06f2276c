# SPDX-License-Identifier: Apache-2.0
"""What an encoded context consists of: the state of each layer after its last token.

Keys and values of full attention are kept in pieces, one per extension: a context that extends another holds the
other's pieces, not a copy of them, and adds its own. The state of linear attention and the keys of a sliding window
are those after the last token, so every context has its own.

Shapes: H key/value heads, E head dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

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

    def changed(self, change: Callable[[StateKind, torch.Tensor], torch.Tensor]) -> "LayerState":
        """A copy with every tensor replaced by what `change` makes of its kind and itself."""
        attention, linear = self.attention, self.linear
        if attention is not None:
            keys, values = (
                tuple(change("keys_values", piece) for piece in pieces)
                for pieces in (attention.keys, attention.values)
            )
            attention = replace(attention, keys=keys, values=values)
        if linear is not None:
            linear = LinearState(
                {index: change("conv", state) for index, state in linear.conv.items()},
                {index: change("recurrent", state) for index, state in linear.recurrent.items()},
            )
        return LayerState(attention, linear)


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
        of_layers: list[dict[str, torch.Tensor]] = [{} for _ in windows]
        for name, tensor in named.items():
            layer, _, kind = name.partition(".")
            of_layers[int(layer)][kind] = tensor
        layers = []
        for index, (window, own) in enumerate(zip(windows, of_layers, strict=True)):
            attention = None
            if "keys" in own:
                # The keys of a window are all that a context has of its prefix.
                before = prefix.layers[index].attention if prefix is not None and window is None else None
                before = before or AttentionState((), ())
                attention = AttentionState((*before.keys, own["keys"]), (*before.values, own["values"]), window)
            conv, recurrent = (
                {int(name.removeprefix(kind)): tensor for name, tensor in own.items() if name.startswith(kind)}
                for kind in ("conv.", "recurrent.")
            )
            layers.append(LayerState(attention, LinearState(conv, recurrent) if conv or recurrent else None))
        return cls(num_tokens, tuple(layers))

    def emptied(self) -> "EncodedContext":
        """The states of a model that has seen nothing: no keys, and linear-attention states of zeros."""

        def empty(kind: StateKind, state: torch.Tensor) -> torch.Tensor:
            return state[..., :0, :] if kind == "keys_values" else torch.zeros_like(state)

        return EncodedContext(0, tuple(layer.changed(empty) for layer in self.layers))

    def mutated(self, kind: StateKind, change: Callable[[torch.Tensor], torch.Tensor]) -> "EncodedContext":
        """A copy in which every tensor of one kind is replaced by `change(tensor)`; see `FrozenContext.mutated`."""

        def change_kind(found: StateKind, state: torch.Tensor) -> torch.Tensor:
            return change(state) if found == kind else state

        return replace(self, layers=tuple(layer.changed(change_kind) for layer in self.layers))
