# SPDX-License-Identifier: Apache-2.0
"""Prefill: the pass without gradient that turns contexts into frozen contexts.

1. Contexts are encoded without padding: alone, or together with others of the same length while a batch stays within
   one chunk. Nothing a layer sees can therefore depend on what else is in the batch.
2. A context runs through the decoder chunk by chunk, so that activations are those of one chunk. The decoder is
   called below the language-model head: logits are never computed.
3. Keys and values are written into buffers of the context's final size, so that a growing cache is never copied.
4. The result is cut into rows and frozen; from here on its tensors are only read.

The model is left as it was: no mode is switched through `train()` or `eval()` (a 4-bit layer would repack its
weights), only the flags that dropout and gradient checkpointing look at, and those are put back.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from frozen_peft.context.cache import AttentionState, EncodedContext, FrozenContext, LayerState, LinearState
from frozen_peft.context.handover import Segment, counted_forward, give_segment, mark_contiguous, require_all_read
from frozen_peft.context.kernels import choose_kernels
from frozen_peft.context.models import (
    get_decoder,
    get_pretrained_model,
    require_exact_continuation,
    require_separable_adapters,
)
from frozen_peft.context.segments import is_segmented

__all__ = ["adapters_active", "encode_context", "without_dropout"]


def encode_context(
    model: torch.nn.Module,
    contexts: list[torch.Tensor],
    *,
    chunk_size: int = 2048,
    adapters: bool = True,
) -> FrozenContext:
    """Encodes contexts once, without gradient.

    Args:
        model: A causal language model of transformers, or a `PeftModel` of one.
        contexts: Token ids of each context, shape `(context tokens,)`, possibly empty for some, int64.
        chunk_size: Context tokens per forward; 0 encodes a context in one forward.
        adapters: Whether adapters are active while the context is encoded.

    Returns:
        One row per context, in their order, on the model's device and in its dtype.

    Raises:
        ValueError: Every context is empty, `chunk_size` is negative, or `adapters=False` without a `PeftModel` or with
            adapters that would meet the context in the decision's forward.
        ContextMismatchError: transformers does not continue this architecture exactly from a cache.
    """
    if chunk_size < 0:
        raise ValueError(f"`prefill_chunk_size` must be 0 (one forward) or more, found {chunk_size}.")
    pretrained = get_pretrained_model(model)
    require_exact_continuation(pretrained)
    choose_kernels(pretrained)
    if not adapters:
        require_separable_adapters(pretrained)
    rows: list[EncodedContext | None] = [None] * len(contexts)
    with torch.no_grad(), adapters_active(model, adapters), without_dropout(model), _uncached_autocast(contexts):
        for group in _groups(contexts, chunk_size):
            encoded = _encode_group(pretrained, torch.stack([contexts[index] for index in group]), chunk_size)
            for index, row in zip(group, encoded, strict=True):
                rows[index] = row
    empty = EncodedContext(0, ())
    return FrozenContext([row or empty for row in rows], segmented=is_segmented(pretrained))


def _groups(contexts: list[torch.Tensor], chunk_size: int) -> Iterator[list[int]]:
    """Indices of contexts to encode together: of equal length, and within one chunk in all."""
    by_length: dict[int, list[int]] = {}
    for index, context in enumerate(contexts):
        by_length.setdefault(len(context), []).append(index)
    for length, indices in by_length.items():
        if length:
            size = max(chunk_size // length, 1)
            yield from (indices[start : start + size] for start in range(0, len(indices), size))


def _encode_group(model: PreTrainedModel, input_ids: torch.Tensor, chunk_size: int) -> list[EncodedContext]:
    """Encodes contexts of one length, shape `(B, C)`, and cuts the cache into rows."""
    decoder = get_decoder(model)
    batch_size, length = input_ids.shape
    device = model.get_input_embeddings().weight.device
    input_ids = input_ids.to(device)
    segmented = is_segmented(model)
    cache = _prefill_cache(model, length, segmented)
    with counted_forward(segmented) as use:
        for start in range(0, length, chunk_size or length):
            chunk = input_ids[:, start : start + (chunk_size or length)]
            position_ids = torch.arange(start, start + chunk.shape[1], device=device).expand(batch_size, -1)
            decoder(input_ids=chunk, position_ids=position_ids, past_key_values=cache, use_cache=True)
    require_all_read(use, model.config.model_type)
    return [
        EncodedContext(length, tuple(_frozen_state(layer, row, batch_size) for layer in cache.layers))
        for row in range(batch_size)
    ]


class _BufferedLayer(DynamicLayer):
    """Attention layer that writes into buffers of the context's full length instead of growing by copies."""

    def __init__(self, capacity: int, segmented: bool):
        super().__init__()
        self.is_initialized = False
        self.capacity, self.segmented, self.num_filled = capacity, segmented, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values = (
                states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
                for states in (key_states, value_states)
            )
            self.is_initialized = True
        rows, start = key_states.shape[0], self.num_filled
        self.num_filled += key_states.shape[-2]
        self.keys[:, :, start : self.num_filled] = key_states
        self.values[:, :, start : self.num_filled] = value_states
        if self.segmented and start and key_states.device.type == "cpu":
            past_keys = tuple(self.keys[row : row + 1, :, :start] for row in range(rows))
            past_values = tuple(self.values[row : row + 1, :, :start] for row in range(rows))
            give_segment(key_states, Segment(past_keys, past_values, padded_length=start))
            return key_states, value_states
        keys, values = self.keys[:, :, : self.num_filled], self.values[:, :, : self.num_filled]
        if self.segmented:
            mark_contiguous(keys)
        return keys, values

    def get_seq_length(self) -> int:
        return self.num_filled


class _BufferedHybridLayer(LinearAttentionAndFullAttentionLayer):
    """Layer of both kinds whose attention part is buffered."""

    def __init__(self, capacity: int, segmented: bool, number_of_states: int):
        super().__init__(number_of_states=number_of_states)
        self.attention = _BufferedLayer(capacity, segmented)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.attention.update(key_states, value_states)
        self.keys, self.values, self.is_initialized = self.attention.keys, self.attention.values, True
        return result

    def get_seq_length(self) -> int:
        return self.attention.num_filled


def _prefill_cache(model: PreTrainedModel, capacity: int, segmented: bool) -> DynamicCache:
    """The architecture's own cache, with buffers in place of the attention layers that grow by copies."""
    cache = DynamicCache(config=model.config)
    if not cache.layers:
        raise AssertionError("DynamicCache(config) always builds its layers")
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _BufferedLayer(capacity, segmented)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            cache.layers[index] = _BufferedHybridLayer(capacity, segmented, layer.number_of_states)
    return cache


def _frozen_state(
    layer: CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer, row: int, batch_size: int
) -> LayerState:
    """One sample's state of one layer; its own storage where the layer keeps more than the context needs."""
    attention = linear = None
    if isinstance(layer, CacheLayerMixin) and layer.keys is not None:
        window = getattr(layer, "sliding_window", None)
        keys, values = layer.keys[row : row + 1], layer.values[row : row + 1]
        if window is not None:
            # A view of the last chunk's keys: cloned, so that the chunk is not kept alive with it.
            keys, values = keys.clone(), values.clone()
        attention = AttentionState(keys, values, window)
    if isinstance(layer, LinearAttentionLayer):
        linear = LinearState(_rows(layer.conv_states, row), _rows(layer.recurrent_states, row))
    return LayerState(attention, linear)


def _rows(states: dict[int, torch.Tensor | None], row: int) -> dict[int, torch.Tensor]:
    return {index: state[row : row + 1] for index, state in states.items() if state is not None}


@contextmanager
def without_dropout(model: torch.nn.Module, *, keep_checkpointing: bool = False) -> Iterator[None]:
    """Clears the training flag of every module but 4-bit layers, and puts it back.

    The flags are set one by one: `model.eval()` would make bitsandbytes (0.50, CPUs with AVX512-BF16) repack its
    4-bit weights for inference at the next forward, for good.

    Args:
        model: The model whose dropout is to be off.
        keep_checkpointing: Leave decoder and decoder layers in training mode, so that gradient checkpointing stays on.
    """
    changed = [
        module
        for module in model.modules()
        if module.training
        and type(module).__name__ != "Linear4bit"
        and not (keep_checkpointing and hasattr(module, "gradient_checkpointing"))
    ]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def adapters_active(model: torch.nn.Module, active: bool) -> AbstractContextManager[None]:
    """Runs a model with its adapters on, or switched off."""
    if active:
        return nullcontext()
    if not isinstance(model, PeftModel):
        raise ValueError(
            "`context_adapters=False` encodes contexts with the adapters switched off, but the model is a "
            f"{type(model).__name__} without adapters. Pass `peft_config`, or leave `context_adapters=True`."
        )
    return model.disable_adapter()


def _uncached_autocast(contexts: list[torch.Tensor]) -> AbstractContextManager[object]:
    """Autocast as it is around the call, but without its cache of cast weights.

    The cache would keep weights that were cast here, without gradient, and hand them to the decision's forward,
    whose adapters would then silently receive none (pytorch/pytorch#48049).
    """
    device_type = contexts[0].device.type if contexts else "cpu"
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)
