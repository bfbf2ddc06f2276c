# SPDX-License-Identifier: Apache-2.0
"""What a configuration says about a model: its weights, adapters, kinds of layer and what it keeps of a context.

1. The model is built on the meta device, so every count is of the modules that training will have: nothing is derived
   a second time from the configuration's fields.
2. Which weights are quantized and adapted is asked of the functions that training asks.
3. Layers of equal weights and equal cache are of one kind. A model of the first few layers, so many that each kind is
   among them, stands for all of them where operations are counted.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from frozen_peft.adapters import lora_config, quantization_config
from frozen_peft.adapters.roles import as_model, linear_modules
from frozen_peft.planning.setting import DTYPE_BYTES, Setting

__all__ = ["Blueprint", "LayerKind"]

# NF4 with double quantization, as bitsandbytes lays it out: blocks of weights with a scale of one byte, blocks of
# scales with one of four; per weight the two code books (16 and 256 numbers) and an offset.
BLOCK, SCALE_BLOCK = 64, 256
CODE_BYTES = 16 * 4 + 256 * 4 + 4


@dataclass(frozen=True)
class LayerKind:
    """Decoder layers that are alike.

    Attributes:
        layers: Their indices.
        name: Type of the mixer's layer, as the configuration has it.
        sliding_window: Window of their attention in tokens; None: no window.
    """

    layers: tuple[int, ...]
    name: str
    sliding_window: int | None


class Blueprint:
    """A model as its configuration describes it.

    Args:
        config: The configuration of a causal language model of transformers; it stays as it is.
        setting: How the model is loaded and adapted.

    Raises:
        ValueError: transformers has no such causal language model, or the preset or roles are none.
    """

    def __init__(self, config: PretrainedConfig, setting: Setting):
        self.config = copy.deepcopy(config)
        self.setting = setting
        dtype = getattr(torch, setting.dtype)
        for part in {id(part): part for part in (self.config, self.config.get_text_config())}.values():
            part.dtype = dtype
        self.model = _as_pretrained(self.config)

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in the base model, tied weights once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Full names of the weights that 4-bit loading quantizes."""
        if not self.setting.load_in_4bit:
            return frozenset()
        kept = quantization_config(self.model).llm_int8_skip_modules
        return frozenset(
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
        )

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the base model as it is loaded."""
        return sum(
            _nf4_bytes(parameter.numel()) if name in self.quantized else parameter.numel() * parameter.element_size()
            for name, parameter in self.model.named_parameters()
        )

    @cached_property
    def largest_quantized(self) -> int:
        """Numbers in the largest 4-bit weight, which a matrix product unpacks; 0: none."""
        weights = dict(self.model.named_parameters())
        return max((weights[name].numel() for name in self.quantized), default=0)

    @cached_property
    def num_adapter_parameters(self) -> int:
        """Numbers in the adapters.

        Raises:
            UnsupportedArchitectureError: The architecture has no known roles.
        """
        if not self.setting.use_peft:
            return 0
        target = self._lora(self.model).target_modules
        return sum(
            self.setting.lora_r * (linear.in_features + linear.out_features)
            for linear in linear_modules(self.model)
            if re.fullmatch(target, linear.name)
        )

    @property
    def adapter_dtype_bytes(self) -> int:
        """Bytes of a number in an adapter: TRL has them in bfloat16 on a 4-bit base, PEFT in float32 elsewhere."""
        return DTYPE_BYTES["bfloat16" if self.setting.load_in_4bit else "float32"]

    @cached_property
    def decoder(self) -> PreTrainedModel:
        """The text decoder."""
        return self.model.get_decoder()

    @cached_property
    def hidden_size(self) -> int:
        """Numbers in a hidden state."""
        return self.config.get_text_config().hidden_size

    @property
    def head_dim(self) -> int:
        """Numbers in a query of one head."""
        text = self.config.get_text_config()
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0: none."""
        text = self.config.get_text_config()
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return next((count for name in names if (count := getattr(text, name, None))), 0)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of decoder layer, in the order of their first one."""
        found: dict[Any, list[int]] = {}
        signatures = layer_signatures(self.model)
        for index, signature in enumerate(signatures):
            found.setdefault(signature, []).append(index)
        return tuple(LayerKind(tuple(layers), signature[0], signature[1]) for signature, layers in found.items())

    @cached_property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(len(kind.layers) for kind in self.kinds)

    def prefix(self) -> PreTrainedModel | PeftModel:
        """The first few layers as a model on the meta device, with its adapters; every kind of layer is in it."""
        num_layers = max(kind.layers[0] for kind in self.kinds) + 1
        model = self.model
        if num_layers < self.num_layers:
            model = _as_pretrained(_truncated(self.config, num_layers, self.num_layers))
            if layer_signatures(model) != layer_signatures(self.model)[:num_layers]:
                # The configuration has a say about layers that is not understood: take all of them.
                model = _as_pretrained(copy.deepcopy(self.config))
        else:
            model = _as_pretrained(copy.deepcopy(self.config))
        if not self.setting.use_peft:
            return model
        adapted = get_peft_model(model, self._lora(model))
        if self.setting.load_in_4bit:
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return adapted

    def _lora(self, model: nn.Module) -> Any:
        roles = self.setting.lora_roles
        return lora_config(
            model,
            preset=self.setting.lora_preset,
            roles=None if roles is None else list(roles),
            r=self.setting.lora_r,
        )


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
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


def layer_signatures(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """What tells one kind of layer from another: its cache, and the names and shapes of its weights."""
    caches = DynamicCache(config=model.config).layers
    types = getattr(model.get_decoder().config, "layer_types", None) or [""] * len(caches)
    return [
        (
            layer_type,
            getattr(cache, "sliding_window", None),
            type(cache).__name__,
            tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters()),
        )
        for layer_type, cache, layer in zip(types, caches, decoder_layers(model), strict=True)
    ]


def _as_pretrained(config: PretrainedConfig) -> PreTrainedModel:
    model = as_model(config)
    assert isinstance(model, PreTrainedModel)
    return model


def _truncated(config: PretrainedConfig, num_layers: int, of: int) -> PretrainedConfig:
    """A configuration of the first layers alone: what it says of each layer is cut to them."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == of and all(isinstance(item, str | int) for item in value):
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return config


def _nf4_bytes(num_weights: int) -> int:
    """Bytes of a weight in NF4 with double quantization."""
    num_blocks = math.ceil(num_weights / BLOCK)
    return math.ceil(num_weights / 2) + num_blocks + 4 * math.ceil(num_blocks / SCALE_BLOCK) + CODE_BYTES


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that get a gradient."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
