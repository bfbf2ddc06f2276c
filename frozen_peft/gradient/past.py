# SPDX-License-Identifier: Apache-2.0
"""What the stretches of a sequence hand on to each other, kept from the forward to the backward pass.

Grows by one stretch at a time in the forward pass, and shrinks by one at a time in the backward pass. Kept are every
stretch's keys and values (for a sliding window, the last that a later stretch can see), and the linear-attention
states that each stretch starts from.
"""

import torch

from frozen_peft.context.cache import FrozenContext
from frozen_peft.gradient.layers import FrozenPast, LayerEnd, LayerKind, LayerPast, LinearStates, Piece

__all__ = ["Past"]


class Past:
    """Keys, values and states between the stretches of one batch.

    Args:
        kinds: Kind of each decoder layer.
        frozen: The frozen context that the first stretch continues from, or None.
        storage: Device to keep everything on; None: where it is computed.
    """

    def __init__(self, kinds: list[LayerKind], frozen: FrozenContext | None, storage: torch.device | None):
        self.kinds, self.storage = kinds, storage
        self._frozen = [_frozen_past(frozen, index) if kind.attends else None for index, kind in enumerate(kinds)]
        # By stretch, then by layer.
        self._pieces: list[list[Piece | None]] = []
        self._starts = [[_frozen_states(frozen, index, kind) for index, kind in enumerate(kinds)]]
        self._lengths: list[int] = []

    def append(self, ends: list[LayerEnd], num_tokens: int) -> None:
        """Adds what a stretch of `num_tokens` tokens left behind in each layer."""
        self._pieces.append([self._piece(end, kind) for end, kind in zip(ends, self.kinds, strict=True)])
        self._starts.append([_moved(end.linear, self.storage) for end in ends])
        self._lengths.append(num_tokens)

    def _piece(self, end: LayerEnd, kind: LayerKind) -> Piece | None:
        if end.keys is None or end.values is None:
            return None
        keys, values = end.keys, end.values
        if kind.sliding_window is not None and kind.sliding_window - 1 < keys.shape[-2]:
            # Copies: views would keep the keys of the whole stretch.
            keys, values = (tensor[..., 1 - kind.sliding_window :, :].clone() for tensor in (keys, values))
        return Piece(keys.to(self.storage), values.to(self.storage)) if self.storage else Piece(keys, values)

    def before(self, stretch: int, device: torch.device, *, with_gradient: bool = False) -> list[LayerPast]:
        """What lies before a stretch in each layer.

        Args:
            stretch: Its index; all stretches before it are there.
            device: Where linear attention takes its starting states.
            with_gradient: Make these states leaves that require gradient.
        """
        num_own = sum(self._lengths[:stretch])
        pasts = []
        for index, kind in enumerate(self.kinds):
            pieces = [piece for layers in self._pieces[:stretch] if (piece := layers[index]) is not None]
            frozen = self._frozen[index]
            if kind.sliding_window is not None:
                pieces = _last_tokens(pieces, kind.sliding_window - 1)
                frozen = frozen if num_own < kind.sliding_window - 1 else None
            states = _moved(self._starts[stretch][index], device)
            pasts.append(LayerPast(pieces, frozen, _leaves(states) if with_gradient else states))
        return pasts

    def forget_states_before(self, stretch: int) -> None:
        """Drops the starting states of all stretches before this one, where there is no backward pass to come."""
        for index in range(stretch):
            self._starts[index] = []

    def pop(self, stretch: int) -> list[Piece | None]:
        """Takes out what a stretch, the last one left, left behind: its keys and values with their gradient."""
        del self._starts[stretch + 1 :]
        if len(self._pieces) <= stretch:
            return [None] * len(self.kinds)
        self._lengths.pop()
        return self._pieces.pop()


def _last_tokens(pieces: list[Piece], num_tokens: int) -> list[Piece]:
    """The pieces that hold the last tokens, the oldest of them cut to what is needed."""
    last: list[Piece] = []
    for piece in reversed(pieces):
        if num_tokens <= 0:
            break
        last.insert(0, piece.last(num_tokens))
        num_tokens -= piece.keys.shape[-2]
    return last


def _moved(states: LinearStates, device: torch.device | None) -> LinearStates:
    if device is None:
        return states
    return LinearStates(
        {index: state.to(device) for index, state in states.conv.items()},
        {index: state.to(device) for index, state in states.recurrent.items()},
    )


def _leaves(states: LinearStates) -> LinearStates:
    return LinearStates(
        {index: state.detach().requires_grad_() for index, state in states.conv.items()},
        {index: state.detach().requires_grad_() for index, state in states.recurrent.items()},
    )


def _frozen_past(frozen: FrozenContext | None, layer: int) -> FrozenPast | None:
    if frozen is None:
        return None
    attention = frozen.layers[layer]
    return FrozenPast(
        tuple(state.keys for state in attention.attention_states),
        tuple(state.values for state in attention.attention_states),
        attention.padded_length,
    )


def _frozen_states(frozen: FrozenContext | None, layer: int, kind: LayerKind) -> LinearStates:
    if frozen is None or not kind.num_linear_states:
        return LinearStates()
    conv = {index: frozen.get_conv_state(layer, index) for index in range(kind.num_linear_states)}
    recurrent = {index: frozen.get_recurrent_state(layer, index) for index in range(kind.num_linear_states)}
    return LinearStates(
        {index: state for index, state in conv.items() if state is not None},
        {index: state for index, state in recurrent.items() if state is not None},
    )
