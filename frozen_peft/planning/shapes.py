# SPDX-License-Identifier: Apache-2.0
"""The shape of a model: its weights, what its layers are made of, and what each keeps of a context.

The model is built from its configuration on the meta device, so every count is of the modules that training will have.
What a layer keeps of a context is read off a cache that a few tokens without numbers ran through. Layers of equal
weights and equal cache are of one kind.

Terms, in numbers per token: a part of a layer (attention, an MLP) makes `wide` of the hidden state and takes `inner`
back to it. Of Llama's MLP these are gate and up projection, and what goes into the down projection.
"""

import copy
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft.adapters.roles import LinearModule, as_model, linear_modules
from frozen_peft.context.capability import reason_against_segments
from frozen_peft.context.models import latent_expansions
from frozen_peft.utils.cache_argument import as_cache_argument
from frozen_peft.utils.compat.transformers import attention_implementation

__all__ = ["Cache", "Layer", "LayerCache", "ModelShape", "Part"]

PROBE_TOKENS = 8
PartKind = Literal["attention", "mlp", "convolution", "gated delta rule", "kimi delta rule", "scan"]
# What recurrent layers do, by a part of the name of a function in their modeling file.
RECURRENT: dict[str, PartKind] = {
    "gated_delta_rule": "gated delta rule",
    "kda": "kimi delta rule",
    "chunk_scan": "scan",
}


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a context, in numbers.

    Attributes:
        keys: Of the keys of a token.
        values: Of its values.
        sliding_window: Window of its attention; None: it keeps every token.
        convolution: Of the state of a short convolution.
        state: Shape of the recurrent state: heads, and what each remembers.
        state_in_float32: The state is in float32, whatever the model's type.
    """

    keys: int = 0
    values: int = 0
    sliding_window: int | None = None
    convolution: int = 0
    state: tuple[int, ...] = (0,)
    state_in_float32: bool = False

    @property
    def num_state(self) -> int:
        """Numbers of the recurrent state."""
        return math.prod(self.state)

    def num_kept(self, num_tokens: int) -> int:
        """Tokens whose keys and values are kept."""
        return num_tokens if self.sliding_window is None else min(num_tokens, self.sliding_window - 1)


@dataclass(frozen=True)
class Cache:
    """What all layers keep of a context of one sample.

    Attributes:
        layers: What each keeps.
        key_bytes: Of a number of its keys.
        value_bytes: Of its values and convolutions.
    """

    layers: tuple[LayerCache, ...]
    key_bytes: int
    value_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes that every further context token adds."""
        return sum(self._of_token(layer) for layer in self.layers if layer.sliding_window is None)

    @property
    def state_bytes(self) -> int:
        """Bytes of linear-attention states, whatever the length."""
        return sum(map(self._of_states, self.layers))

    def num_bytes(self, num_tokens: int, num_boundaries: int = 1) -> int:
        """Bytes of a context of so many tokens, with its states, and keys of windows, at so many places.

        What turns share is there once.
        """
        total = num_boundaries * self.state_bytes if num_tokens else 0
        for layer in self.layers:
            copies = 1 if layer.sliding_window is None else num_boundaries
            total += copies * self._of_token(layer) * layer.num_kept(num_tokens)
        return total

    def gradient_bytes(self, num_tokens: int) -> int:
        """Bytes of keys and values in float32, which stretches add gradient to."""
        return sum(4 * (layer.keys + layer.values) * layer.num_kept(num_tokens) for layer in self.layers)

    def _of_token(self, layer: LayerCache) -> int:
        return self.key_bytes * layer.keys + self.value_bytes * layer.values

    def _of_states(self, layer: LayerCache) -> int:
        state_bytes = 4 if layer.state_in_float32 else self.value_bytes
        return self.value_bytes * layer.convolution + state_bytes * layer.num_state


@dataclass(frozen=True)
class Part:
    """A part of a layer.

    Attributes:
        kind: What it does.
        linears: Its linear modules: full name and features in.
        wide: Numbers that its projections make of a token's hidden state.
        inner: Numbers that it takes back to the hidden state.
        channels: Of its short convolutions.
        has_head_norms: Queries and keys are normalised.
        expert: The same two numbers of one routed expert; None: there are none.
    """

    kind: PartKind
    linears: tuple[tuple[str, int], ...]
    wide: int
    inner: int
    channels: int = 0
    has_head_norms: bool = False
    expert: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layer:
    """A decoder layer, see `Part` and `LayerCache`."""

    parts: tuple[Part, ...]
    num_norms: int
    cache: LayerCache


class ModelShape:
    """What a configuration says about a model.

    Args:
        config: The configuration of a causal language model of transformers; it stays as it is.

    Raises:
        ValueError: transformers has no such causal language model, or its layers are not understood.
    """

    def __init__(self, config: PretrainedConfig):
        config = copy.deepcopy(config)
        # So that what is kept in float32 all the same shows.
        for part in (config, config.get_text_config()):
            part.dtype = torch.bfloat16
        model = as_model(config)
        assert isinstance(model, PreTrainedModel)
        self.model, self.text = model, model.get_decoder().config
        self.parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.num_parameters = sum(self.parameters.values())
        self.hidden_size: int = self.text.hidden_size
        self.num_heads: int = self.text.num_attention_heads
        head = model.get_output_embeddings()
        self.vocabulary: int = head.weight.shape[0] if head is not None else 0
        self.num_experts_per_token: int = getattr(self.text, "num_experts_per_tok", 0) or 0
        self.linears = linear_modules(model)
        self.is_eager = attention_implementation(self.text) == "eager"
        self.can_segment = reason_against_segments(model) is None
        # As `continues_in_segments` has it.
        self.continues_in_segments = self.can_segment and not latent_expansions(model.get_decoder())
        self._layers = _decoder_layers(model)
        self.num_layers = len(self._layers)

    @cached_property
    def layers(self) -> Counter[Layer]:
        """The kinds of layer, in the order of their first one, and how many there are of each.

        Raises:
            ValueError: Their mixers are not understood.
        """
        linears: dict[int, list[LinearModule]] = {}
        for linear in self.linears:
            linears.setdefault(linear.layer, []).append(linear)
        return Counter(
            _read_layer(layer, linears.get(index, []), cache, self.hidden_size)
            for index, (layer, cache) in enumerate(zip(self._layers, self.caches, strict=True))
        )

    @cached_property
    def caches(self) -> list[LayerCache]:
        """What each layer keeps of a context."""
        decoder = self.model.get_decoder()
        # Any implementation gives the same cache, and this one runs without numbers.
        self.model.set_experts_implementation("batched_mm")
        past = DynamicCache(config=self.model.config)
        with torch.no_grad(), torch.device("meta"):
            decoder(
                inputs_embeds=torch.empty(1, PROBE_TOKENS, self.hidden_size, dtype=self.model.dtype),
                position_ids=torch.arange(PROBE_TOKENS)[None],
                use_cache=True,
                **as_cache_argument(decoder, past),
            )
        return [_read_cache(layer) for layer in past.layers]


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, in order."""
    decoder = model.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    expected = decoder.config.num_hidden_layers
    if len(layers) != expected:
        raise ValueError(
            f"{type(decoder).__name__} has {len(layers)} layers that can be checkpointed, and its configuration says "
            f"{expected}: its layers are not understood."
        )
    return layers


def _read_cache(layer: CacheLayerMixin) -> LayerCache:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    convolutions = [state for state in getattr(layer, "conv_states", {}).values() if state is not None]
    states = [state for state in getattr(layer, "recurrent_states", {}).values() if state is not None]
    return LayerCache(
        0 if keys is None else keys.numel() // PROBE_TOKENS,
        0 if values is None else values.numel() // PROBE_TOKENS,
        getattr(layer, "sliding_window", None),
        sum(state.numel() for state in convolutions),
        tuple(states[0].shape[1:]) if states else (0,),
        any(state.dtype == torch.float32 for state in states),
    )


def _read_layer(layer: nn.Module, linears: list[LinearModule], cache: LayerCache, hidden_size: int) -> Layer:
    children = dict(layer.named_children())
    parts = []
    for name, part in children.items():
        inside = [linear for linear in linears if linear.path.startswith(f"{name}.")]
        expert = _read_expert(part, hidden_size)
        if not inside and expert is None:
            continue
        # One goes back to the hidden state: the last that gives as much, unless another takes as much too (a query).
        back = [linear for linear in inside if linear.out_features == hidden_size]
        back = [linear for linear in back if linear.in_features != hidden_size] or back
        kind = _kind_of(part, cache)
        parts.append(
            Part(
                kind,
                tuple((linear.name, linear.in_features) for linear in inside),
                sum(linear.out_features for linear in inside if linear not in back[-1:]),
                back[-1].in_features if back else 0,
                sum(module.in_channels for module in part.modules() if isinstance(module, nn.Conv1d)),
                kind == "attention" and any("norm" in child.lower() for child, _ in part.named_modules()),
                expert,
            )
        )
    return Layer(tuple(parts), sum("norm" in name.lower() for name in children), cache)


def _read_expert(part: nn.Module, hidden_size: int) -> tuple[int, int] | None:
    """Numbers that one routed expert makes of a token and takes back to it; their weights are stacked."""
    stacked = {name: weight for name, weight in part.named_parameters() if "experts." in name and weight.ndim == 3}
    wide = inner = 0
    for name, weight in stacked.items():
        width = weight.numel() // (len(weight) * hidden_size)
        wide, inner = (wide, width) if "down" in name else (wide + width, inner)
    return (wide, inner) if stacked else None


def _kind_of(part: nn.Module, cache: LayerCache) -> PartKind:
    if any(isinstance(module, nn.Conv1d) for module in part.modules()):
        if not cache.num_state:
            return "convolution"
        functions = " ".join(vars(sys.modules[type(part).__module__]))
        for name, kind in RECURRENT.items():
            if name in functions:
                return kind
        raise ValueError(f"{type(part).__name__} keeps a recurrent state, and what it does is not understood")
    return "attention" if "Attention" in type(part).__name__ else "mlp"
