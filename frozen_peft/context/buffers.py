# SPDX-License-Identifier: Apache-2.0
"""The cache that prefill writes: the architecture's own, with keys and values in buffers of their final size.

Prefill may go on from contexts that are encoded already. Their keys and values stay where they are, as pieces in front
of the new buffer; the states that a layer overwrites (linear attention) are copied first.

Shapes: B contexts that are encoded together, H key/value heads, E head dimension.
"""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from frozen_peft.context.encoded import AttentionState, EncodedContext, LayerState, LinearState
from frozen_peft.context.handover import Segment, give_segment, mark_contiguous
from frozen_peft.context.kernels.table import current_capabilities, has_flash_prefill

__all__ = ["can_extend", "frozen_row", "keeps_all_keys", "prefill_cache", "resume_linear", "resume_window"]


class _BufferedLayer(DynamicLayer):
    """Attention layer that writes into buffers of its final size instead of growing by copies.

    Args:
        capacity: Tokens to come.
        segmented: Attention reads segments.
        past: What the contexts have before those, one state each and all of one length; empty: nothing.
    """

    def __init__(self, capacity: int, segmented: bool, past: list[AttentionState]):
        super().__init__()
        self.is_initialized = False
        self.capacity, self.segmented, self.past, self.num_filled = capacity, segmented, past, 0
        self.num_past = past[0].num_kept if past else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (
                states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
                for states in (key_states, value_states)
            )
            self.is_initialized = True
        start = self.num_filled
        self.num_filled += key_states.shape[-2]
        self.keys[:, :, start : self.num_filled] = key_states
        self.values[:, :, start : self.num_filled] = value_states
        if self.segmented and self.num_past + start and not _can_read_as_one(key_states, value_states):
            give_segment(key_states, value_states, self._segment(start))
            return key_states, value_states
        keys, values = self.keys[:, :, : self.num_filled], self.values[:, :, : self.num_filled]
        if self.past:
            # One layer's keys and values at a time, for kernels that read them as one.
            keys = torch.cat([_joined([state.keys for state in self.past]), keys], dim=-2)
            values = torch.cat([_joined([state.values for state in self.past]), values], dim=-2)
        if self.segmented:
            mark_contiguous(keys)
        return keys, values

    def _segment(self, num_own: int) -> Segment:
        """Everything before the tokens that are being written."""
        rows = range(self.keys.shape[0])
        past = self.past or [AttentionState((), ())] * len(rows)
        own_keys, own_values = (
            [(tensor[row : row + 1, :, :num_own],) if num_own else () for row in rows]
            for tensor in (self.keys, self.values)
        )
        return Segment(
            tuple(past[row].keys + own_keys[row] for row in rows),
            tuple(past[row].values + own_values[row] for row in rows),
            padded_length=self.num_past + num_own,
        )

    def get_seq_length(self) -> int:
        return self.num_past + self.num_filled


def _can_read_as_one(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a kernel takes a chunk's queries and all keys up to them; else the chunk is a segment of its own."""
    device = keys.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else keys.dtype
    return has_flash_prefill(current_capabilities(device), dtype, keys.shape[-1], values.shape[-1])


class _BufferedHybridLayer(LinearAttentionAndFullAttentionLayer):
    """Layer of both kinds whose attention part is buffered."""

    def __init__(self, capacity: int, segmented: bool, past: list[AttentionState], number_of_states: int):
        super().__init__(number_of_states=number_of_states)
        self.attention = _BufferedLayer(capacity, segmented, past)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.attention.update(key_states, value_states)
        self.keys, self.values, self.is_initialized = self.attention.keys, self.attention.values, True
        return result

    def get_seq_length(self) -> int:
        return self.attention.get_seq_length()


EXTENDABLE_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    DummyLayer,
)


def can_extend(model: PreTrainedModel) -> bool:
    """Whether an encoded context of this model holds all that going on from it takes."""
    return all(type(layer) in EXTENDABLE_LAYERS for layer in DynamicCache(config=model.config).layers)


def keeps_all_keys(model: PreTrainedModel) -> bool:
    """Whether a layer of this model keeps the keys of every token, be they ever so many."""
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, CacheLayerMixin) and not getattr(layer, "sliding_window", None) for layer in layers)


def prefill_cache(
    model: PreTrainedModel, prefixes: list[EncodedContext], num_tokens: int, segmented: bool
) -> DynamicCache:
    """The architecture's own cache, ready to take the tokens to come.

    Args:
        model: The model whose cache it is.
        prefixes: What the contexts begin with, one each and all of one length; empty: nothing.
        num_tokens: Tokens to come.
        segmented: Attention reads segments.
    """
    cache = DynamicCache(config=model.config)
    if not cache.layers:
        raise AssertionError("DynamicCache(config) always builds its layers")
    for index, layer in enumerate(cache.layers):
        states = [prefix.layers[index] for prefix in prefixes]
        attention = [state.attention for state in states if state.attention is not None]
        linear = [state.linear for state in states if state.linear is not None]
        if type(layer) is DynamicLayer:
            layer = _BufferedLayer(num_tokens, segmented, attention)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            layer = _BufferedHybridLayer(num_tokens, segmented, attention, layer.number_of_states)
        elif isinstance(layer, DynamicSlidingWindowLayer) and attention:
            keys, values = _joined([state.keys for state in attention]), _joined([state.values for state in attention])
            resume_window(layer, keys, values, prefixes[0].num_tokens)
        if linear:
            resume_linear(layer, linear)
        cache.layers[index] = layer
    return cache


def resume_window(layer: DynamicSlidingWindowLayer, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
    """Lets a sliding-window layer go on after `num_tokens` tokens, of which it keeps these, `(B, H, kept, E)`."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.cumulative_length = keys, values, num_tokens


def resume_linear(layer: LinearAttentionLayer, past: list[LinearState]) -> None:
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


def _joined(rows: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Pieces of each context as one batch, shape `(B, H, tokens, E)`."""
    joined = [pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2) for pieces in rows]
    return joined[0] if len(joined) == 1 else torch.cat(joined)


def frozen_row(cache: DynamicCache, row: int, num_tokens: int, prefix: EncodedContext | None) -> EncodedContext:
    """One context of a cache that prefill has filled, in storage of its own.

    Args:
        cache: What `prefill_cache` made, after the forwards.
        row: Index of the context.
        num_tokens: Tokens in the context, prefix included.
        prefix: What it begins with.
    """
    layers = []
    for index, layer in enumerate(cache.layers):
        before = prefix.layers[index].attention if prefix is not None else None
        layers.append(_frozen_state(layer, row, before))
    return EncodedContext(num_tokens, tuple(layers))


def _frozen_state(
    layer: CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer, row: int, before: AttentionState | None
) -> LayerState:
    attention = linear = None
    if isinstance(layer, CacheLayerMixin) and layer.keys is not None:
        window = getattr(layer, "sliding_window", None)
        # A window's keys are a view of the last chunk's, which is not to be kept alive with it.
        keys, values = _own(layer.keys, row, window is not None), _own(layer.values, row, window is not None)
        if before is None or window is not None:
            attention = AttentionState((keys,), (values,), window)
        else:
            attention = AttentionState((*before.keys, keys), (*before.values, values))
    if isinstance(layer, LinearAttentionLayer):
        linear = LinearState(_own_states(layer.conv_states, row), _own_states(layer.recurrent_states, row))
    return LayerState(attention, linear)


def _own(batch: torch.Tensor, row: int, copy: bool = False) -> torch.Tensor:
    """One row `(1, ...)` of a batch; a copy where the batch has others, so that each can be freed by itself."""
    return batch[row : row + 1].clone() if copy or batch.shape[0] > 1 else batch


def _own_states(states: dict[int, torch.Tensor | None], row: int) -> dict[int, torch.Tensor]:
    return {index: _own(state, row) for index, state in states.items() if state is not None}
