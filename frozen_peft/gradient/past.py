# SPDX-License-Identifier: Apache-2.0
"""What the stretches of a sequence hand on to each other, kept from the forward to the backward pass.

Grows by one stretch at a time in the forward pass, and shrinks by one at a time in the backward pass. Kept are every
stretch's keys and values (for a sliding window, the last that a later stretch can see), and the linear-attention
states that each stretch starts from.
"""

import torch

from frozen_peft.context.cache import FrozenContext
from frozen_peft.context.encoded import AttentionState
from frozen_peft.gradient.layers import LayerEnd, LayerKind, LayerPast, LinearStates, Piece

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
        self._frozen: list[list[AttentionState]] = [[] for _ in kinds]
        # By stretch, then by layer.
        self._pieces: list[list[Piece | None]] = []
        self._starts = [[LinearStates() for _ in kinds]]
        if frozen is not None:
            for layer, kind in enumerate(kinds):
                states = (state.attention for state in frozen.states(layer))
                self._frozen[layer] = [state for state in states if state is not None]
                self._starts[0][layer] = _frozen_states(frozen, layer, kind.num_linear_states)
        self._lengths: list[int] = []

    def append(self, ends: list[LayerEnd], num_tokens: int) -> None:
        """Adds what a stretch of `num_tokens` tokens left behind in each layer."""
        self._pieces.append([self._piece(end, kind) for end, kind in zip(ends, self.kinds, strict=True)])
        self._starts.append([end.linear.map(self._stored) for end in ends])
        self._lengths.append(num_tokens)

    def _piece(self, end: LayerEnd, kind: LayerKind) -> Piece | None:
        if end.keys is None or end.values is None:
            return None
        keys, values = end.keys, end.values
        if kind.sliding_window is not None and kind.sliding_window - 1 < keys.shape[-2]:
            # Copies: views would keep the keys of the whole stretch.
            keys, values = (tensor[..., 1 - kind.sliding_window :, :].clone() for tensor in (keys, values))
        return Piece(self._stored(keys), self._stored(values))

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.storage is None else tensor.to(self.storage)

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
                frozen = frozen if num_own < kind.sliding_window - 1 else []
            states = self._starts[stretch][index].map(lambda state: state.to(device))
            if with_gradient:
                states = states.map(lambda state: state.detach().requires_grad_())
            pasts.append(LayerPast(pieces, frozen, states))
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


def _frozen_states(frozen: FrozenContext, layer: int, num_states: int) -> LinearStates:
    found = LinearStates()
    for index in range(num_states):
        for states, state in (
            (found.conv, frozen.get_conv_state(layer, index)),
            (found.recurrent, frozen.get_recurrent_state(layer, index)),
        ):
            if state is not None:
                states[index] = state
    return found
