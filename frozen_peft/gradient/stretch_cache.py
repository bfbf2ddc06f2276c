# SPDX-License-Identifier: Apache-2.0
"""The cache that one stretch of a sequence reads from, and what the stretch leaves behind.

Like a frozen context (see `context.cache`) it is only read: a layer gets what lies before the stretch together with
its own keys and values, and running it again gives the same again. Two things differ. What lies before the stretch
has a gradient, and what the stretch itself produced is noted, for the stretches behind it:

1. Keys and values are constants to autograd all the same. The backward pass of attention adds their gradient straight
   to the piece they belong to, in float32 or more, so that no gradient of the whole length is ever built. An attention
   whose own keys need no gradient gives none to those before it either: they come from the same weights.
2. The states of linear attention are ordinary inputs and outputs of the stretch, with gradient.

Shapes: B samples, H key/value heads, E head dimension.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.cache_utils import DummyLayer

from frozen_peft.context.cache import padded_pieces
from frozen_peft.context.handover import KeyValueGradient, Segment, give_segment, mark_frozen_length, uncompiled
from frozen_peft.context.read_only import ReadOnlyAttention, ReadOnlyCache, ReadOnlyLinear
from frozen_peft.errors import ContextMismatchError, UnsupportedArchitectureError
from frozen_peft.gradient.layers import LayerEnd, LayerKind, LayerPast

__all__ = ["StretchCache"]


class _JoinedPast(torch.autograd.Function):
    """Earlier pieces and a stretch's own keys (or values) as one tensor, for attention that reads no segments."""

    @staticmethod
    def forward(
        ctx: Any,
        own: torch.Tensor,
        past: tuple[torch.Tensor, ...],
        gradients: tuple[torch.Tensor | None, ...],
    ) -> torch.Tensor:
        ctx.lengths, ctx.gradients = [piece.shape[-2] for piece in past], gradients
        return torch.cat([*(piece.to(own.device) for piece in past), own], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *before, own = gradient.split([*ctx.lengths, gradient.shape[-2] - sum(ctx.lengths)], dim=-2)
        for total, part in zip(ctx.gradients, before, strict=True):
            if total is not None:
                total += part.to(total.device)
        return own, None, None


class _StretchAttention(ReadOnlyAttention):
    """Attention layer of one stretch: gives what lies before it together with its own, and stores nothing."""

    def __init__(self, kind: LayerKind, past: LayerPast, num_before: int, segmented: bool):
        ReadOnlyAttention.__init__(self, num_before, past.num_kept, kind.sliding_window)
        self.past, self.segmented = past, segmented
        self.end: LayerEnd | None = LayerEnd()

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Own keys and values `(B, H, tokens, E)` with those before them."""
        if self.end is not None:
            self.end.keys, self.end.values = key_states, value_states
        if not self.num_kept:
            return key_states, value_states
        needs_gradient = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        gradients = [piece.add_gradient_to() if needs_gradient else None for piece in self.past.pieces]
        if self.segmented:
            give_segment(key_states, value_states, self._segment(key_states.shape[0], gradients))
            return key_states, value_states
        keys, values = (self._joined(own, index, gradients) for index, own in enumerate((key_states, value_states)))
        for tensor in (keys, values):
            mark_frozen_length(tensor, self.past.num_frozen)
        return keys, values

    def _segment(self, num_rows: int, gradients: list[KeyValueGradient | None]) -> Segment:
        frozen, pieces = self.past.frozen, self.past.pieces
        keys, values, of_rows = [], [], []
        for row in range(num_rows):
            frozen_keys, frozen_values = (frozen[row].keys, frozen[row].values) if frozen else ((), ())
            keys.append((*frozen_keys, *(piece.keys[row : row + 1] for piece in pieces)))
            values.append((*frozen_values, *(piece.values[row : row + 1] for piece in pieces)))
            own = [g and (g[0][row : row + 1], g[1][row : row + 1]) for g in gradients]
            of_rows.append((*(None for _ in frozen_keys), *own))
        return Segment(tuple(keys), tuple(values), self.num_kept, tuple(of_rows))

    def _joined(self, own: torch.Tensor, index: int, gradients: list[KeyValueGradient | None]) -> torch.Tensor:
        """Keys (index 0) or values (1) of the past and a stretch's own, shape `(B, H, kept tokens + own, E)`."""
        past = [piece.values if index else piece.keys for piece in self.past.pieces]
        totals = [gradient and gradient[index] for gradient in gradients]
        if self.past.frozen:
            frozen = [state.values if index else state.keys for state in self.past.frozen]
            past, totals = [padded_pieces(frozen), *past], [None, *totals]
        return _JoinedPast.apply(own, tuple(past), tuple(totals))


class _StretchLinear(ReadOnlyLinear):
    """Linear-attention layer of one stretch: gives its starting states, and notes its final ones."""

    def __init__(self, kind: LayerKind, past: LayerPast):
        ReadOnlyLinear.__init__(self, kind.num_linear_states, past.linear.conv, past.linear.recurrent)
        self.past = past
        self.end: LayerEnd | None = LayerEnd()

    def conv_state(self, state_idx: int) -> torch.Tensor | None:
        return self.past.linear.conv.get(state_idx)

    def recurrent_state(self, state_idx: int) -> torch.Tensor | None:
        return self.past.linear.recurrent.get(state_idx)

    @uncompiled
    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> torch.Tensor:
        """The convolution's input after the inputs before it, `(B, channels, kernel size + tokens)`."""
        past = self.conv_state(state_idx)
        if past is not None:
            conv_states = torch.cat([past.to(conv_states.dtype), conv_states], dim=-1)
            conv_kernel_size = past.shape[-1]
        if conv_kernel_size is None:
            raise UnsupportedArchitectureError(
                "A short convolution does not tell its cache the size of its kernel. Leave `sequence_chunk_size` out, "
                "or use another architecture."
            )
        if self.end is not None:
            missing = max(conv_kernel_size - conv_states.shape[-1], 0)
            padded = torch.nn.functional.pad(conv_states, (missing, 0))
            # A copy: a view would keep the inputs of the whole stretch.
            self.end.linear.conv[state_idx] = padded[..., -conv_kernel_size:].clone()
        return conv_states

    @uncompiled
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        if self.end is not None:
            self.end.linear.recurrent[state_idx] = recurrent_states
        return recurrent_states


class _StretchHybrid(_StretchLinear, _StretchAttention):
    """Layer of both kinds (Falcon-H1)."""

    def __init__(self, kind: LayerKind, past: LayerPast, num_before: int, segmented: bool):
        _StretchAttention.__init__(self, kind, past, num_before, segmented)
        _StretchLinear.__init__(self, kind, past)

    get_max_length = _StretchAttention.get_max_length


class StretchCache(ReadOnlyCache):
    """The cache of the forward of one stretch.

    Args:
        kinds: Kind of each decoder layer.
        pasts: What lies before the stretch in each of them.
        num_before: Tokens before the stretch, those of the longest frozen context included.
        segmented: The model's attention reads segments; otherwise keys and values are joined for each layer.
    """

    def __init__(self, kinds: list[LayerKind], pasts: list[LayerPast], num_before: int, segmented: bool):
        layers: list[Any] = []
        for kind, past in zip(kinds, pasts, strict=True):
            if kind.attends and kind.num_linear_states:
                layers.append(_StretchHybrid(kind, past, num_before, segmented))
            elif kind.attends:
                layers.append(_StretchAttention(kind, past, num_before, segmented))
            else:
                layers.append(_StretchLinear(kind, past) if kind.num_linear_states else DummyLayer())
        super().__init__(layers=layers)
        self.kinds = kinds

    def take_ends(self, model_type: str) -> list[LayerEnd]:
        """What the stretch left behind in each layer.

        From then on nothing is noted: a layer that runs again, for its activations, leaves nothing new behind, and a
        graph that refers to this cache is not referred to by it.

        Raises:
            ContextMismatchError: A layer did not use its cache.
        """
        ends = []
        for index, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            end = LayerEnd()
            if not isinstance(layer, DummyLayer):
                end, layer.end = layer.end, None
            if (kind.attends and end.keys is None) or (kind.num_linear_states and not end.linear.tensors()):
                raise ContextMismatchError(
                    f"Layer {index} of `{model_type}` ran without its cache, so the next stretch has nothing to "
                    "continue from. Leave `sequence_chunk_size` out, or use another architecture."
                )
            ends.append(end)
        return ends
