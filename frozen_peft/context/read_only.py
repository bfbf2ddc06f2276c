# SPDX-License-Identifier: Apache-2.0
"""Layers of a cache that is only read: what they tell a transformers model of the tokens before those at hand.

What they give it, and where that comes from, is for those who derive from them: a frozen context (`cache`), or what
lies before a stretch of a sequence (`gradient.stretch_cache`).
"""

from collections.abc import Collection

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

__all__ = ["ReadOnlyAttention", "ReadOnlyCache", "ReadOnlyLinear"]


class ReadOnlyAttention(CacheLayerMixin):
    """Attention layer that stores nothing.

    Args:
        num_before: Tokens before those at hand.
        num_kept: The last of them, whose keys and values are there.
        sliding_window: Window in tokens, None for full attention.
    """

    def __init__(self, num_before: int, num_kept: int, sliding_window: int | None):
        CacheLayerMixin.__init__(self)
        self.num_before, self.num_kept = num_before, num_kept
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.is_initialized = True

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("This cache is read-only and cannot be initialized again.")

    def get_seq_length(self) -> int:
        return self.num_before

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask (kept tokens and those at hand), and the index of its first column."""
        return self.num_kept + query_length, self.num_before - self.num_kept


class ReadOnlyLinear(LinearAttentionCacheLayerMixin):
    """Linear-attention layer that stores nothing.

    Args:
        num_states: States that it keeps of each kind.
        conv: Indices of its conv states that are there.
        recurrent: Likewise of its recurrent states.
    """

    def __init__(self, num_states: int, conv: Collection[int], recurrent: Collection[int]):
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=num_states)
        for index in range(num_states):
            self.has_previous_state[index] = bool(conv or recurrent)
            self.is_conv_states_initialized[index] = index in conv
            self.is_recurrent_states_initialized[index] = index in recurrent
        # With this flag a layer takes its chunked path even for few tokens, which leaves the conv state alone.
        self.record_past = True

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("This cache is read-only and cannot be initialized again.")

    def conv_state(self, state_idx: int) -> torch.Tensor | None:
        """Conv states of the batch, shape `(B, channels, kernel size)`."""
        raise NotImplementedError

    def recurrent_state(self, state_idx: int) -> torch.Tensor | None:
        """Recurrent states of the batch, shape `(B, ...)`; None where the layer has only a convolution."""
        raise NotImplementedError


class ReadOnlyCache(Cache):
    """A cache of such layers."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._linear_layer(layer_idx).conv_state(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._linear_layer(layer_idx).recurrent_state(state_idx)

    def _linear_layer(self, layer_idx: int) -> ReadOnlyLinear:
        layer = self.layers[layer_idx]
        assert isinstance(layer, ReadOnlyLinear), f"layer {layer_idx} is a {type(layer).__name__}"
        return layer

    @property
    def is_linear(self) -> list[bool]:
        return [
            isinstance(layer, ReadOnlyLinear) and not isinstance(layer, ReadOnlyAttention) for layer in self.layers
        ]

    @property
    def is_compileable(self) -> bool:
        return False
