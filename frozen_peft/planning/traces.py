# SPDX-License-Identifier: Apache-2.0
"""What one training step holds above weights, adapters and the cache, counted on a model without storage.

Each function runs what training runs, on the first few layers (see `Blueprint.prefix`), and counts:

1. `prefill`: the encoding of a context, chunk by chunk, by `context.prefill`.
2. `graded`: forward, loss and backward of what carries gradient, behind a frozen context or alone.
3. `stretched`: the same in stretches, by `gradient.stretches`.

The layers that were left out add, at the moment when most is held, what a layer of their kind keeps for its backward
pass: it is counted as the difference that the layer's forward makes.

Shapes: B samples, T tokens, H key/value heads, E head dimension.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import trl.trainer.utils
from peft import PeftModel
from transformers import DynamicCache
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction

from frozen_peft.context import FrozenContext, decision_forward
from frozen_peft.context.capability import reason_against_segments
from frozen_peft.context.encoded import AttentionState, EncodedContext, LayerState, LinearState
from frozen_peft.context.latents import hand_on_latents
from frozen_peft.context.models import get_decoder, get_pretrained_model, latent_expansions
from frozen_peft.context.modes import prefill_mode
from frozen_peft.context.prefill import extend_contexts
from frozen_peft.context.rope import rope_limits
from frozen_peft.context.segments import IMPLEMENTATION
from frozen_peft.distillation.divergence import Answers, Divergence
from frozen_peft.distillation.head import LogitHead
from frozen_peft.gradient import group_checkpoints, stretched_forward
from frozen_peft.gradient.stretched_decoder import stretch_bounds
from frozen_peft.planning.blueprint import Blueprint, decoder_layers
from frozen_peft.planning.kernel_memory import accelerated_kernels
from frozen_peft.planning.setting import Setting
from frozen_peft.planning.tracing import LiveBytes, without_storage
from frozen_peft.utils.cache_argument import as_cache_argument

__all__ = ["Cache", "LayerCache", "Trace", "Tracer"]

PROBE_TOKENS = 8


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a context.

    Attributes:
        kv_bytes: Bytes of a token's keys and values.
        kv_numbers: How many numbers that is.
        sliding_window: Window of its attention; None: it keeps every token.
        state_bytes: Bytes of its linear-attention states, whatever the length.
    """

    kv_bytes: int
    kv_numbers: int
    sliding_window: int | None
    state_bytes: int

    def num_kept(self, num_tokens: int) -> int:
        """Tokens whose keys and values are kept."""
        return num_tokens if self.sliding_window is None else min(num_tokens, self.sliding_window - 1)

    def num_bytes(self, num_tokens: int, num_boundaries: int = 1) -> int:
        """Bytes after so many tokens, of which there are states, and keys of a window, at so many places."""
        copies = 1 if self.sliding_window is None else num_boundaries
        states = num_boundaries * self.state_bytes if num_tokens else 0
        return copies * self.kv_bytes * self.num_kept(num_tokens) + states


@dataclass(frozen=True)
class Cache:
    """What all layers keep of a context of one sample."""

    layers: tuple[LayerCache, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes that every further context token adds."""
        return sum(layer.kv_bytes for layer in self.layers if layer.sliding_window is None)

    @property
    def state_bytes(self) -> int:
        """Bytes of linear-attention states, whatever the length."""
        return sum(layer.state_bytes for layer in self.layers)

    def num_bytes(self, num_tokens: int, num_boundaries: int = 1) -> int:
        """Bytes of a context of so many tokens, with its states at so many places: what turns share is there once."""
        return sum(layer.num_bytes(num_tokens, num_boundaries) for layer in self.layers)

    def gradient_bytes(self, num_tokens: int) -> int:
        """Bytes of keys and values in float32, which stretches add gradient to."""
        return sum(4 * layer.kv_numbers * layer.num_kept(num_tokens) for layer in self.layers)


@dataclass(frozen=True)
class Trace:
    """Bytes of one step, for all layers of the model.

    Attributes:
        kept: Held at the end of the forward pass, for the backward pass.
        peak: Most that is held at a time.
    """

    kept: int
    peak: int


class Tracer:
    """Counts for one model and setting.

    Args:
        blueprint: The model.
        setting: How it runs; lengths are given to each count.
    """

    def __init__(self, blueprint: Blueprint, setting: Setting):
        self.blueprint, self.setting = blueprint, setting
        self.model = blueprint.prefix()
        self.pretrained = get_pretrained_model(self.model)
        without_storage(self.model)
        self.layers = decoder_layers(self.pretrained)
        self.decoder = get_decoder(self.pretrained)
        # As `use_segmented_attention` decides.
        self.can_segment = reason_against_segments(self.pretrained) is None
        hand_on_latents(self.decoder)
        # As `continues_in_segments` does.
        self.continues_in_segments = self.can_segment and not latent_expansions(self.decoder)
        self.model.train()
        if self.setting.gradient_checkpointing:
            self.pretrained.activation_checkpointing_enable({"use_reentrant": False})
            if isinstance(self.model, PeftModel):
                self.model.enable_input_require_grads()
            group_checkpoints(self.decoder, self.setting.checkpoint_every)

    @cached_property
    def cache(self) -> Cache:
        """What every layer of the model keeps of a context."""
        with self._running(segmented=False), prefill_mode(self.model):
            past = DynamicCache(config=self.pretrained.config)
            tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long)
            self.decoder(input_ids=tokens, **as_cache_argument(self.decoder, past), use_cache=True)
            probed = [_layer_cache(layer) for layer in past.layers]
            self._encoded = tuple(_layer_tensors(layer) for layer in past.layers)
        layers = {}
        for kind in self.blueprint.kinds:
            layers.update(dict.fromkeys(kind.layers, probed[kind.layers[0]]))
        return Cache(tuple(layers[index] for index in range(self.blueprint.num_layers)))

    @property
    def own_cache(self) -> Cache:
        """What the layers that are run keep of a context."""
        return Cache(self.cache.layers[: len(self.layers)])

    def prefill(self, num_tokens: int, chunk_size: int) -> int:
        """Bytes that encoding contexts of so many tokens takes above the cache that comes out.

        A model that is not segmented joins keys and values of one layer at a time.
        """
        batch = self.setting.batch
        self.cache  # noqa: B018  (probed by itself, not while something is counted)
        with self._running(segmented=self.continues_in_segments) as count, prefill_mode(self.model):
            tokens = torch.zeros(batch, num_tokens, dtype=torch.long)
            encoded = extend_contexts(self.model, [], tokens, chunk_size=chunk_size)
        del encoded
        return max(count.peak - batch * self.own_cache.num_bytes(num_tokens), 0)

    def graded(self, num_graded: int, num_frozen: int) -> Trace:
        """Forward and backward of so many tokens behind a frozen context, or behind none."""
        segmented = self.can_segment and bool(num_frozen)
        frozen = self._frozen(num_frozen, segmented, num_graded) if num_frozen else None
        with self._running(segmented, frozen) as count, ExitStack() as stack:
            if frozen is not None:
                stack.enter_context(decision_forward(self.model))
            return self._step(count, num_graded, frozen, num_frozen, num_before=0)

    def stretched(self, num_graded: int, num_frozen: int, stretch: int) -> Trace:
        """The same in stretches; what is handed on from one to the next is counted for the layers that are run."""
        segmented = self.continues_in_segments
        frozen = self._frozen(num_frozen, segmented, num_graded) if num_frozen else None
        num_before = stretch_bounds(num_graded, stretch)[-1][0]
        with self._running(segmented, frozen) as count, stretched_forward(self.model, stretch):
            return self._step(count, num_graded, frozen, num_frozen, num_before)

    def head(self, num_tokens: int) -> int:
        """Bytes that the loss of so many tokens takes, forward and backward, above their hidden states."""
        setting, head = self.setting, self.pretrained.get_output_embeddings()
        with self._running(segmented=False) as count:
            dtype = torch.bfloat16 if setting.bf16 else head.weight.dtype
            hidden = torch.empty(setting.batch, num_tokens, head.weight.shape[1], dtype=dtype, device="cpu")
            hidden.requires_grad_()
            before = count.live
            self._loss(hidden, torch.zeros(setting.batch, num_tokens, dtype=torch.long)).backward()
        return count.peak - before

    def distilled(self, num_tokens: int, divergence: Divergence) -> int:
        """Bytes that the divergence of so many tokens takes, forward and backward, above their hidden states.

        What is at hand of the teacher is among them.
        """
        head = LogitHead.of(self.pretrained)
        with self._running(segmented=False) as count:
            hidden = self._hidden(num_tokens).requires_grad_()
            before = count.live
            answers = self._answers(num_tokens, divergence)
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in answers.values())
            divergence.per_token(hidden, head, answers, head).sum().backward()
        # Whole numbers are real, and not counted.
        return count.peak - before + (num_bytes if divergence.top_k else 0)

    def answered(self, num_tokens: int, num_frozen: int, divergence: Divergence) -> int:
        """Bytes that a teacher's forward of so many tokens takes behind its frozen context, or behind none."""
        segmented = self.can_segment and bool(num_frozen)
        frozen = self._frozen(num_frozen, segmented, num_tokens) if num_frozen else None
        with self._running(segmented, frozen) as count, prefill_mode(self.model), decision_forward(self.model):
            hidden = self._forward(num_tokens, frozen, num_frozen)
            divergence.answers(hidden.reshape(-1, hidden.shape[-1]), LogitHead.of(self.pretrained))
        return count.peak

    def _hidden(self, num_tokens: int) -> torch.Tensor:
        """Last hidden states `(rows * tokens, hidden size)` without storage."""
        weight = self.pretrained.get_output_embeddings().weight
        dtype = torch.bfloat16 if self.setting.bf16 else weight.dtype
        return torch.empty(self.setting.batch * num_tokens, weight.shape[1], dtype=dtype, device="cpu")

    def _answers(self, num_tokens: int, divergence: Divergence) -> Answers:
        """What is kept of a teacher for so many tokens of each row."""
        num_rows, top_k = self.setting.batch * num_tokens, divergence.top_k
        if not top_k or top_k >= LogitHead.of(self.pretrained).num_tokens:
            return {"hidden": self._hidden(num_tokens)}
        tokens = torch.zeros(num_rows, top_k, dtype=torch.int32)
        return {"tokens": tokens, "logprobs": torch.empty(num_rows, top_k + 1, device="cpu")}

    def _forward(self, num_tokens: int, frozen: FrozenContext | None, num_frozen: int) -> torch.Tensor:
        """Last hidden states of so many tokens behind a frozen context, or behind none."""
        tokens = torch.zeros(self.setting.batch, num_tokens, dtype=torch.long)
        arguments: dict[str, Any] = {"input_ids": tokens}
        if frozen is not None:
            arguments |= as_cache_argument(self.decoder, frozen)
            arguments["position_ids"] = torch.arange(num_frozen, num_frozen + num_tokens).expand(len(tokens), -1)
        hidden: torch.Tensor = self.decoder(**arguments, use_cache=False).last_hidden_state
        return hidden

    def _step(
        self, count: LiveBytes, num_graded: int, frozen: FrozenContext | None, num_frozen: int, num_before: int
    ) -> Trace:
        with self._counted_layers(count) as kept_by_layer:
            hidden = self._forward(num_graded, frozen, num_frozen)
            kept = count.live
            # The head's function held the hidden states until here.
            gradient = torch.empty_like(hidden)
            hidden.backward(gradient)
        batch, more = self.setting.batch, 0
        for kind in self.blueprint.kinds:
            num_run = sum(index < len(self.layers) for index in kind.layers)
            # The gradient of keys and values before a stretch is counted beside, for all layers at once.
            own = kept_by_layer[kind.layers[0]]
            own -= batch * Cache((self.cache.layers[kind.layers[0]],)).gradient_bytes(num_before)
            more += (len(kind.layers) - num_run) * max(own, 0)
        return Trace(kept + more, count.peak + more)

    def _loss(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """TRL's loss: tiles of logits. On an accelerator of supervised positions alone, in place."""
        head = self.pretrained.get_output_embeddings()
        if self.setting.accelerator:
            num_supervised = min(self.setting.batch * (self.setting.decision_length - 1), hidden.shape[:2].numel())
            rows = hidden.reshape(-1, hidden.shape[-1])[:num_supervised]
            return _TiledHead.apply(rows).sum()
        # Pages that are never written take no memory: a buffer as wide as the vocabulary.
        width = min(trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, head.weight.shape[0])
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = tokens[:, 1:].reshape(-1)
        outputs = ("log_probs", "entropy", "is_top1")
        logprobs = ChunkedLogProbFunction.apply(rows, head.weight, head.bias, targets, 1.0, width, None, 1.0, outputs)[
            0
        ]
        return -logprobs.sum()

    @contextmanager
    def _running(self, segmented: bool, frozen: FrozenContext | None = None) -> Iterator[LiveBytes]:
        """Everything that a step runs in; gives the count of what it allocates."""
        implementation = IMPLEMENTATION if segmented else self.pretrained.config._attn_implementation
        before = self.decoder.config._attn_implementation
        if segmented:
            self.decoder.set_attn_implementation(implementation)
        parameters = list(self.model.parameters())
        try:
            with ExitStack() as stack:
                if self.setting.accelerator and not self.setting.reference_kernels:
                    stack.enter_context(accelerated_kernels(self.pretrained))
                if self.setting.bf16:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                for parameter in parameters:
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                context = [tensor for row in frozen.rows for tensor in row.tensors()] if frozen is not None else []
                count = LiveBytes([*parameters, *self.model.buffers(), *gradients, *context])
                stack.enter_context(count)
                yield count
        finally:
            for parameter in parameters:
                parameter.grad = None
            if segmented:
                self.decoder.set_attn_implementation(before)

    @contextmanager
    def _counted_layers(self, count: LiveBytes) -> Iterator[dict[int, int]]:
        """Gives, by layer, what its first forward with gradient adds to what is held."""
        kept: dict[int, int] = {}
        before: dict[int, int] = {}

        def enter(index: int) -> None:
            if torch.is_grad_enabled():
                before.setdefault(index, count.live)

        def leave(index: int) -> None:
            if torch.is_grad_enabled():
                kept.setdefault(index, count.live - before[index])

        handles = []
        for index, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(lambda *_, index=index: enter(index)))
            handles.append(layer.register_forward_hook(lambda *_, index=index: leave(index)))
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    def _frozen(self, num_tokens: int, segmented: bool, num_graded: int) -> FrozenContext:
        """A frozen context without storage, to be followed by so many tokens."""
        assert self.cache is not None  # fills _encoded
        layers = tuple(_layer_state(tensors, num_tokens) for tensors in self._encoded)
        row = EncodedContext(num_tokens, layers)
        rope_length = rope_limits(self.pretrained).rope_length(num_tokens + num_graded)
        return FrozenContext(
            [row] * self.setting.batch, segmented=segmented, rope_lengths=[rope_length] * self.setting.batch
        )


class _TiledHead(torch.autograd.Function):
    """What TRL's head with Triton kernels allocates: one tile of logits, and the gradient in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        _tile(hidden)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (hidden,) = ctx.saved_tensors
        of_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32)
        _tile(hidden)
        return of_hidden.to(hidden.dtype)


def _tile(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(min(len(hidden), TOKEN_CHUNK_SIZE), trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE)


@dataclass(frozen=True)
class _Tensors:
    """What a layer's cache holds after the probe."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    sliding_window: int | None
    conv: dict[int, torch.Tensor]
    recurrent: dict[int, torch.Tensor]


def _layer_tensors(layer: Any) -> _Tensors:
    return _Tensors(
        getattr(layer, "keys", None),
        getattr(layer, "values", None),
        getattr(layer, "sliding_window", None),
        {index: state for index, state in getattr(layer, "conv_states", {}).items() if state is not None},
        {index: state for index, state in getattr(layer, "recurrent_states", {}).items() if state is not None},
    )


def _layer_cache(layer: Any) -> LayerCache:
    tensors = _layer_tensors(layer)
    attention = [tensor for tensor in (tensors.keys, tensors.values) if tensor is not None]
    states = [*tensors.conv.values(), *tensors.recurrent.values()]
    num_tokens = attention[0].shape[-2] if attention else 1
    return LayerCache(
        sum(tensor.numel() * tensor.element_size() for tensor in attention) // num_tokens,
        sum(tensor.numel() for tensor in attention) // num_tokens,
        tensors.sliding_window,
        sum(tensor.numel() * tensor.element_size() for tensor in states),
    )


def _layer_state(tensors: _Tensors, num_tokens: int) -> LayerState:
    """State of a layer after so many tokens, without storage."""
    attention = linear = None
    if tensors.keys is not None and tensors.values is not None:
        window = tensors.sliding_window
        num_kept = num_tokens if window is None else min(num_tokens, window - 1)
        keys, values = (
            part.new_empty(*part.shape[:-2], num_kept, part.shape[-1]) for part in (tensors.keys, tensors.values)
        )
        attention = AttentionState((keys,), (values,), window)
    if tensors.conv or tensors.recurrent:
        linear = LinearState(dict(tensors.conv), dict(tensors.recurrent))
    return LayerState(attention, linear)
