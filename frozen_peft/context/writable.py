# SPDX-License-Identifier: Apache-2.0
"""Caches that forwards write to, over contexts that are encoded already: in prefill, and in decoding.

Both are the architecture's own, and leave the contexts that they go on from as they are:

1. Keys and values of full attention are read where they lie, as pieces in front of what is written; where attention
   cannot read segments, they are joined with it. So ten candidates over one context hold one context.
2. Prefill, which knows how many tokens are to come, writes them into buffers of their final size instead of growing by
   copies. It is over with the keys and values of the last layer: what that makes of them, nothing reads. Decoding
   grows by a token at a time.
3. What a layer overwrites, the keys of a sliding window and the states of linear attention, is copied first. It is
   small.

Shapes: B rows of the batch, H key/value heads, D new tokens, E head dimension.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from frozen_peft.context.cache import FrozenContext, padded_pieces
from frozen_peft.context.encoded import AttentionState, EncodedContext, LayerState, LinearState
from frozen_peft.context.handover import Segment, give_segment, mark_contiguous
from frozen_peft.context.kernels.table import current_capabilities, has_flash_prefill
from frozen_peft.context.models import get_pretrained_model
from frozen_peft.errors import UnsupportedArchitectureError

__all__ = ["AllWritten", "can_extend", "frozen_row", "growing_cache", "keeps_all_keys", "prefill_cache"]

EXTENDABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    DummyLayer,
)


class _OverPast(DynamicLayer):
    """Attention layer whose own keys and values follow on others that stay where they lie.

    Args:
        past: What each row has before its own, one state each; empty: nothing.
        num_past: Tokens of that in the longest row.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool

    def __init__(self, past: list[AttentionState], num_past: int):
        super().__init__()
        self.past, self.num_past, self.num_own = past, num_past, 0

    def give_past(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Attaches everything before these keys and values to them."""
        rows = range(len(key_states))
        past = self.past or [AttentionState((), ())] * len(rows)
        own_keys, own_values = (
            [(own[row : row + 1, :, : self.num_own],) if self.num_own else () for row in rows]
            for own in (self.keys, self.values)
        )
        segment = Segment(
            tuple(past[row].keys + own_keys[row] for row in rows),
            tuple(past[row].values + own_values[row] for row in rows),
            padded_length=self.num_past + self.num_own,
        )
        give_segment(key_states, value_states, segment)

    def get_seq_length(self) -> int:
        return self.num_past + self.num_own


class _GrowingLayer(_OverPast):
    """Attention layer that grows by what decoding adds."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the new keys and values, `(B, H, D, E)`, and returns them with everything before them attached."""
        self.give_past(key_states, value_states)
        super().update(key_states, value_states)
        self.num_own += key_states.shape[-2]
        return key_states, value_states


class _BufferedLayer(_OverPast):
    """Attention layer that writes into buffers of its final size.

    Args:
        capacity: Tokens to come.
        segmented: Attention reads segments.
        past: What the rows have before those, all of one length; empty: nothing.

    Attributes:
        ends_forward: Leave the forward that it has written for, by `AllWritten`.
    """

    def __init__(self, capacity: int, segmented: bool, past: list[AttentionState]):
        super().__init__(past, past[0].num_kept if past else 0)
        self.capacity, self.segmented, self.ends_forward = capacity, segmented, False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (
                states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
                for states in (key_states, value_states)
            )
            self.is_initialized = True
        before, stop = self.get_seq_length(), self.num_own + key_states.shape[-2]
        self.keys[:, :, self.num_own : stop] = key_states
        self.values[:, :, self.num_own : stop] = value_states
        if self.ends_forward:
            self.num_own = stop
            raise AllWritten
        if self.segmented and before and not _can_read_as_one(key_states, value_states):
            self.give_past(key_states, value_states)
            self.num_own = stop
            return key_states, value_states
        self.num_own = stop
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        if self.past:
            # One layer's keys and values at a time, for kernels that read them as one.
            past_keys, past_values = _joined(self.past)
            keys, values = torch.cat([past_keys, keys], dim=-2), torch.cat([past_values, values], dim=-2)
        if self.segmented:
            mark_contiguous(keys)
        return keys, values


def _can_read_as_one(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a kernel takes a chunk's queries and all keys up to them; else the chunk is a segment of its own."""
    device = keys.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else keys.dtype
    return has_flash_prefill(current_capabilities(device), dtype, keys.shape[-1], values.shape[-1])


class _HybridLayer(LinearAttentionAndFullAttentionLayer):
    """Layer of both kinds whose attention part is a layer of its own."""

    def __init__(self, attention: _OverPast, number_of_states: int):
        super().__init__(number_of_states=number_of_states)
        self.attention = attention

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.attention.update(key_states, value_states)
        self.keys, self.values, self.is_initialized = self.attention.keys, self.attention.values, True
        return result

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()


class AllWritten(Exception):  # noqa: N818
    """Nothing that a forward has left to do would be kept."""


def can_extend(model: PreTrainedModel) -> bool:
    """Whether an encoded context of this model holds all that going on from it takes."""
    return all(type(layer) in EXTENDABLE_LAYERS for layer in DynamicCache(config=model.config).layers)


def keeps_all_keys(model: PreTrainedModel) -> bool:
    """Whether a layer of this model keeps the keys of every token, be they ever so many."""
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, CacheLayerMixin) and not getattr(layer, "sliding_window", None) for layer in layers)


def prefill_cache(
    model: PreTrainedModel, prefixes: list[EncodedContext], num_tokens: int, segmented: bool, *, may_end: bool
) -> DynamicCache:
    """A cache to encode with, ready to take the tokens to come.

    Args:
        model: The model whose cache it is.
        prefixes: What the contexts begin with, one each and all of one length; empty: nothing.
        num_tokens: Tokens to come.
        segmented: Attention reads segments.
        may_end: Forwards may be left by `AllWritten` when the last layer has written.
    """
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        attention, linear = _by_kind([prefix.layers[index] for prefix in prefixes])
        if type(layer) is DynamicLayer:
            layer = _BufferedLayer(num_tokens, segmented, attention)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            layer = _HybridLayer(_BufferedLayer(num_tokens, segmented, attention), layer.number_of_states)
        elif attention:
            _resume_window(layer, attention, prefixes[0].num_tokens)
        if linear:
            _resume_linear(layer, linear)
        cache.layers[index] = layer
    if isinstance(last := cache.layers[-1], _BufferedLayer):
        last.ends_forward = may_end
    return cache


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
        attention, linear = _by_kind(frozen.states(index))
        if attention and attention[0].sliding_window is not None:
            _resume_window(layer, attention, num_tokens)
        elif attention and frozen.segmented:
            growing = _GrowingLayer(attention, num_tokens)
            layer = _HybridLayer(growing, layer.number_of_states) if linear else growing
        elif attention:
            layer.update(*_joined(attention))
        if linear:
            _resume_linear(layer, linear)
        cache.layers[index] = layer
    return cache


def _by_kind(states: Sequence[LayerState]) -> tuple[list[AttentionState], list[LinearState]]:
    """Attention and linear-attention states of the rows, each empty where the layer has none."""
    attention = [state.attention for state in states if state.attention is not None]
    return attention, [state.linear for state in states if state.linear is not None]


def _joined(past: list[AttentionState]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each row, shapes `(B, H, longest, E)`."""
    return padded_pieces([state.keys for state in past]), padded_pieces([state.values for state in past])


def _resume_window(layer: DynamicSlidingWindowLayer, past: list[AttentionState], num_tokens: int) -> None:
    """Lets a sliding-window layer go on after `num_tokens` tokens, of which these states hold the last."""
    keys, values = _joined(past)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, num_tokens


def _resume_linear(layer: LinearAttentionLayer, past: list[LinearState]) -> None:
    """Lets a linear-attention layer go on from copies of states, one for each row of the batch."""
    for index in past[0].conv:
        conv = torch.cat([state.conv[index] for state in past])
        # Buffers of the layer's own, since it overwrites them.
        layer.lazy_initialization(conv_states=conv, state_idx=index)
        layer.conv_states[index].copy_(conv)
        layer.has_previous_state[index] = True
    for index in past[0].recurrent:
        recurrent = torch.cat([state.recurrent[index] for state in past])
        layer.lazy_initialization(recurrent_states=recurrent, state_idx=index)
        layer.recurrent_states[index].copy_(recurrent)


def frozen_row(cache: DynamicCache, row: int, num_tokens: int, prefix: EncodedContext | None) -> EncodedContext:
    """One context of a cache that prefill has filled, in storage of its own.

    Args:
        cache: What `prefill_cache` made, after the forwards.
        row: Index of the context.
        num_tokens: Tokens in the context, prefix included.
        prefix: What it begins with.
    """
    named: dict[str, torch.Tensor] = {}
    windows: list[int | None] = []
    for index, layer in enumerate(cache.layers):
        windows.append(None)
        if isinstance(layer, CacheLayerMixin) and layer.keys is not None:
            windows[index] = window = getattr(layer, "sliding_window", None)
            # A window's keys are a view of the last chunk's, which is not to be kept alive with it.
            named[f"{index}.keys"] = _own(layer.keys, row, copy=window is not None)
            named[f"{index}.values"] = _own(layer.values, row, copy=window is not None)
        if isinstance(layer, LinearAttentionLayer):
            for kind, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
                for state, tensor in states.items():
                    if tensor is not None:
                        named[f"{index}.{kind}.{state}"] = _own(tensor, row)
    return EncodedContext.from_own_tensors(num_tokens, named, tuple(windows), prefix)


def _own(batch: torch.Tensor, row: int, *, copy: bool = False) -> torch.Tensor:
    """One row `(1, ...)` of a batch; a copy where the batch has others, so that each can be freed by itself."""
    return batch[row : row + 1].clone() if copy or batch.shape[0] > 1 else batch
