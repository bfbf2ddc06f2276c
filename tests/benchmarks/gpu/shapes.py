# SPDX-License-Identifier: Apache-2.0
"""The models that are built, by the sizes of their published configurations."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig, Qwen3_5TextConfig, Qwen3NextConfig

# Longer than any context here, so that nothing is refused for its length.
MAX_POSITIONS = 1 << 19


@dataclass(frozen=True)
class ModelShape:
    """A model to build.

    Attributes:
        name: As its publisher calls it.
        config: Makes its configuration.
        quantized: Linear layers in NF4, everything else in 16 bit; otherwise all in 16 bit.
    """

    name: str
    config: Callable[[], PretrainedConfig]
    quantized: bool


def qwen3_5_27b() -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=64,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        max_position_embeddings=MAX_POSITIONS,
    )


def qwen3_5_9b() -> Qwen3_5TextConfig:
    """What transformers 5.23 defaults to, and calls the 9B style."""
    return Qwen3_5TextConfig(max_position_embeddings=MAX_POSITIONS)


def qwen3_next_80b() -> Qwen3NextConfig:
    """What transformers 5.23 defaults to; its experts are no linear layers, and stay in 16 bit."""
    return Qwen3NextConfig(max_position_embeddings=MAX_POSITIONS)


def tiny() -> Qwen3_5TextConfig:
    """The pattern of the large ones with numbers of a few digits."""
    return Qwen3_5TextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
    )


MODELS = (
    ModelShape("Qwen3.5-27B", qwen3_5_27b, quantized=True),
    ModelShape("Qwen3.5-9B", qwen3_5_9b, quantized=False),
    ModelShape("Qwen3-Next-80B-A3B", qwen3_next_80b, quantized=True),
)
SMOKE_MODELS = (ModelShape("tiny-nf4", tiny, quantized=True),)
