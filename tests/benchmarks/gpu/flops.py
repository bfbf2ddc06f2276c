# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a prefill in closed form, a multiplication and an addition counted as two.

| part | per token |
| --- | --- |
| linear layers | 2 for every weight that acts on the token |
| attention | 4 x query heads x head dim for every key that the token sees, itself included |
| delta rule | in chunks of C tokens, see `delta_rule_flops` |
| convolution | 2 x channels x kernel |

Counted is what the model asks for, not what a kernel does: attention is causal, padding and dequantization are free.
Norms, activations and rotations are left out; so is the head, which a prefill never runs.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

CHUNK = 64


@dataclass(frozen=True)
class PrefillFlops:
    """Operations of the prefill of one context, by part."""

    linear: float
    attention: float
    delta_rule: float
    convolution: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.delta_rule + self.convolution


def prefill_flops(config: PretrainedConfig, num_tokens: int) -> PrefillFlops:
    """Operations to encode a context of so many tokens.

    Args:
        config: Of a Qwen3.5 (dense) or Qwen3-Next text model.
        num_tokens: Tokens of the context.
    """
    num_gdn = sum(kind == "linear_attention" for kind in config.layer_types)
    num_attention = len(config.layer_types) - num_gdn
    num_pairs = num_tokens * (num_tokens + 1) / 2
    return PrefillFlops(
        linear=2.0 * num_tokens * linear_weights_per_token(config),
        attention=num_attention * attention_flops(config, num_pairs),
        delta_rule=num_gdn * delta_rule_flops(config, num_tokens)["total"],
        convolution=num_gdn * 2.0 * num_tokens * _gdn_channels(config) * config.linear_conv_kernel_dim,
    )


def linear_weights_per_token(config: PretrainedConfig) -> int:
    """Weights of the decoder's linear layers that act on a token; of experts, those it is routed to."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    # Queries and their output gate, keys, values, output.
    attention = hidden * (2 * queries + 2 * keys + queries)
    # q, k, v; z; beta and decay; output.
    gdn = hidden * (_gdn_channels(config) + values + 2 * config.linear_num_value_heads + values)
    kinds = config.layer_types
    mixing = sum(gdn if kind == "linear_attention" else attention for kind in kinds)
    return mixing + len(kinds) * _mlp_weights_per_token(config)


def attention_flops(config: PretrainedConfig, num_pairs: float) -> float:
    """Operations of one attention layer: scores and weighted values of so many pairs of query and key."""
    return 4.0 * num_pairs * config.num_attention_heads * config.head_dim


def delta_rule_flops(config: PretrainedConfig, num_tokens: int) -> dict[str, float]:
    """Operations of the gated delta rule in one layer, in chunks of `CHUNK` tokens C, for every value head.

    With key dim K and value dim V, per chunk: keys against keys and queries against keys, 2 x 2 C² K; what the keys
    read of the state, what the queries read, what the state gains, 3 x 2 C K V; attention within the chunk, 2 C² V.
    That is `products`. `solve` is the triangular system, C² (K + V).
    """
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    num_chunks = -(-num_tokens // CHUNK) * config.linear_num_value_heads
    products = num_chunks * 2.0 * (2 * CHUNK**2 * key + CHUNK**2 * value + 3 * CHUNK * key * value)
    solve = num_chunks * float(CHUNK**2) * (key + value)
    return {"products": products, "solve": solve, "total": products + solve}


def _gdn_channels(config: PretrainedConfig) -> int:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return 2 * keys + config.linear_num_value_heads * config.linear_value_head_dim


def _mlp_weights_per_token(config: PretrainedConfig) -> int:
    experts = getattr(config, "num_experts", 0)
    if not experts:
        return 3 * config.hidden_size * config.intermediate_size
    routed = config.num_experts_per_tok * config.moe_intermediate_size
    # Gate, up and down of the experts and of the shared one, the router, the gate of the shared expert.
    return config.hidden_size * (3 * (routed + config.shared_expert_intermediate_size) + experts + 1)
