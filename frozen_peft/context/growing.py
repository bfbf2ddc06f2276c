# SPDX-License-Identifier: Apache-2.0
"""A cache that grows over frozen contexts: what decoding writes to.

1. Rows of a frozen context, the same one as often as candidates are wanted of it, become the rows of one batch.
2. Keys and values of full attention are read where they lie. Each row keeps those of its own new tokens only, so ten
   candidates over one context hold one context. Where attention cannot read segments, each row gets a copy.
3. The keys of a sliding window and the states of linear attention are overwritten by what comes next, so each row gets
   a copy. They are small.

The frozen context stays as it is, and any number of caches may grow over it.

Shapes: B rows, H key/value heads, D new tokens, E head dimension.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from frozen_peft.context.buffers import can_extend, resume_linear, resume_window
from frozen_peft.context.cache import FrozenContext, padded_pieces
from frozen_peft.context.encoded import AttentionState
from frozen_peft.context.handover import Segment, give_segment
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.errors import UnsupportedArchitectureError

__all__ = ["growing_cache"]


class _GrowingLayer(DynamicLayer):
    """Attention layer of which the frozen part is read in place and the rest grows.

    Args:
        past: The rows' frozen keys and values.
        num_past: Columns of the frozen part in a mask: the tokens of the longest row.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, past: list[AttentionState], num_past: int):
        super().__init__()
        self.past, self.num_past = past, num_past

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the new keys and values, `(B, H, D, E)`, and returns them with everything before them attached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_own = self.get_seq_length() - self.num_past
        give_segment(key_states, value_states, self._segment(num_own))
        own_keys = [self.keys, key_states] if num_own else [key_states]
        own_values = [self.values, value_states] if num_own else [value_states]
        self.keys, self.values = torch.cat(own_keys, dim=-2), torch.cat(own_values, dim=-2)
        return key_states, value_states

    def _segment(self, num_own: int) -> Segment:
        own_keys, own_values = (
            [(own[row : row + 1],) if num_own else () for row in range(len(self.past))]
            for own in (self.keys, self.values)
        )
        return Segment(
            tuple(state.keys + own for state, own in zip(self.past, own_keys, strict=True)),
            tuple(state.values + own for state, own in zip(self.past, own_values, strict=True)),
            padded_length=self.num_past + num_own,
        )

    def get_seq_length(self) -> int:
        return self.num_past + (self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0)


class _GrowingHybridLayer(LinearAttentionAndFullAttentionLayer):
    """Layer of both kinds whose attention part reads its frozen part in place."""

    def __init__(self, past: list[AttentionState], num_past: int, number_of_states: int):
        super().__init__(number_of_states=number_of_states)
        self.attention = _GrowingLayer(past, num_past)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()


def growing_cache(model: torch.nn.Module, frozen: FrozenContext) -> DynamicCache:
    """A cache to decode with, one row for each row of `frozen`.

    Towards the model it looks like left-padded contexts of one length, so the forwards that write to it take an
    attention mask with as many columns, and the decoding that runs them is inside
    `counted_forward(frozen.segmented)`.

    Args:
        model: The model that encoded the contexts, or a `PeftModel` of it.
        frozen: The contexts; `select` repeats a row for several candidates.

    Raises:
        UnsupportedArchitectureError: A layer of this architecture keeps more than an encoded context holds.
    """
    pretrained = get_pretrained_model(model)
    if not can_extend(pretrained):
        raise UnsupportedArchitectureError(
            f"`{pretrained.config.model_type}` cannot be decoded from an encoded context: its cache has layers that "
            "keep more than keys, values and linear-attention states. Serve it, and sample with `--endpoint`."
        )
    cache = DynamicCache(config=pretrained.config)
    num_tokens = max(frozen.lengths)
    for index, layer in enumerate(cache.layers):
        states = frozen.states(index)
        attention = [state.attention for state in states if state.attention is not None]
        linear = [state.linear for state in states if state.linear is not None]
        if attention and attention[0].sliding_window is not None:
            resume_window(layer, *_copied(attention), num_tokens)
        elif attention and frozen.segmented:
            layer = (
                _GrowingHybridLayer(attention, num_tokens, layer.number_of_states)
                if linear
                else _GrowingLayer(attention, num_tokens)
            )
        elif attention:
            layer.update(*_copied(attention))
        if linear:
            resume_linear(layer, linear)
        cache.layers[index] = layer
    return cache


def _copied(past: list[AttentionState]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each row, shapes `(B, H, longest, E)`."""
    return padded_pieces([state.keys for state in past]), padded_pieces([state.values for state in past])
