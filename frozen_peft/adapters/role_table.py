# SPDX-License-Identifier: Apache-2.0
"""Which projection of which architecture plays which role, and which of its rows do.

A *layout* says, for one linear module, which roles it holds: each role with the output rows that belong to it,
`None` meaning all of them. Rows are half-open ranges of output features, in the order the modeling file of
transformers 5.23 splits them; each layout names the method it was read from.

State-space and convolution layers take the roles of the Gated DeltaNet, by what each part does to the state:

- Mamba-2 (`in_proj`): z is `gate`, x is `gdn_value`, B is `gdn_key` (how the input is written), C is `gdn_query`
  (how the state is read), dt is `decay`. dt also scales the input, so it does what `beta` does in a GDN layer; as
  one number cannot be two roles' own, it counts as `decay`.
- Short convolution of LFM2 (`in_proj`): x is `gdn_value`, B gates what enters the convolution state (`beta`), C
  gates what is read from it (`gate`).
- Kimi's latent attention: the latent rows of `kv_a_proj_with_mqa` serve keys and values, so they belong to both
  roles; the rows of the shared rotary key belong to `key` alone.

`mlp` covers dense MLPs and shared experts that are `nn.Linear`. Routed experts are stacked parameters in
transformers 5, not `nn.Linear`, and routers are no MLP: neither has a role.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

__all__ = ["ATTENTION_LEAVES", "BYPASSED", "LAYOUTS", "MLP_LEAVES", "ROLES", "Layout", "Role", "RowRanges"]

Role = Literal[
    "query",
    "key",
    "value",
    "output",
    "gate",
    "beta",
    "decay",
    "gdn_query",
    "gdn_key",
    "gdn_value",
    "gdn_output",
    "mlp",
]
ROLES: tuple[Role, ...] = get_args(Role)

RowRanges = tuple[tuple[int, int], ...]
"""Half-open ranges of output features, ascending and disjoint."""

# A layout reads sizes off the module that owns the projection (the mixer), which has them whatever the config's
# field names; mixers of different architectures share no type, hence Any.
Layout = Callable[[Any], Mapping[Role, RowRanges | None]]


def _rows(groups: int, *parts: tuple[Role, int]) -> dict[Role, RowRanges]:
    """Lay `parts` (role, rows per group) side by side, `groups` times over."""
    stride = sum(size for _, size in parts)
    ranges: dict[Role, RowRanges] = {}
    start = 0
    for role, size in parts:
        own = tuple((group * stride + start, group * stride + start + size) for group in range(groups))
        ranges[role] = (*ranges.get(role, ()), *own)
        start += size
    return ranges


def _whole(role: Role) -> Layout:
    return lambda mixer: {role: None}


def _query_and_gate(mixer: Any) -> dict[Role, RowRanges]:
    """Qwen3.5 and Qwen3-Next attention `q_proj`: per head, the query and then its output gate."""
    num_heads = mixer.q_proj.out_features // (2 * mixer.head_dim)
    return _rows(num_heads, ("query", mixer.head_dim), ("gate", mixer.head_dim))


def _gdn_qkv(mixer: Any) -> dict[Role, RowRanges]:
    """Qwen3.5 `in_proj_qkv`: queries, keys, values, each of all heads."""
    return _rows(1, ("gdn_query", mixer.key_dim), ("gdn_key", mixer.key_dim), ("gdn_value", mixer.value_dim))


def _gdn_qkvz(mixer: Any) -> dict[Role, RowRanges]:
    """Qwen3-Next `in_proj_qkvz`, `fix_query_key_value_ordering`: per key head, q, k, v and z of its group."""
    value_rows = mixer.value_dim // mixer.num_k_heads
    return _rows(
        mixer.num_k_heads,
        ("gdn_query", mixer.head_k_dim),
        ("gdn_key", mixer.head_k_dim),
        ("gdn_value", value_rows),
        ("gate", value_rows),
    )


def _gdn_ba(mixer: Any) -> dict[Role, RowRanges]:
    """Qwen3-Next `in_proj_ba`, same method: per key head, beta and then decay of its value heads."""
    heads_per_group = mixer.num_v_heads // mixer.num_k_heads
    return _rows(mixer.num_k_heads, ("beta", heads_per_group), ("decay", heads_per_group))


def _mamba2(mixer: Any) -> dict[Role, RowRanges]:
    """Mamba-2 `in_proj`, the two splits in `forward`: z, x, B, C, dt."""
    state_rows = mixer.n_groups * mixer.ssm_state_size
    return _rows(
        1,
        ("gate", mixer.intermediate_size),
        ("gdn_value", mixer.intermediate_size),
        ("gdn_key", state_rows),
        ("gdn_query", state_rows),
        ("decay", mixer.num_heads),
    )


def _short_conv(mixer: Any) -> dict[Role, RowRanges]:
    """LFM2 `conv.in_proj`: B, C, x, each of the hidden size."""
    size = mixer.in_proj.out_features // 3
    return _rows(1, ("beta", size), ("gate", size), ("gdn_value", size))


def _latent_keys_and_values(mixer: Any) -> dict[Role, RowRanges]:
    """Kimi `kv_a_proj_with_mqa`: the shared latent of keys and values, then the shared rotary key."""
    latent = (0, mixer.kv_lora_rank)
    return {"key": ((0, mixer.kv_lora_rank + mixer.qk_rope_head_dim),), "value": (latent,)}


def _expanded_keys_and_values(mixer: Any) -> dict[Role, RowRanges]:
    """Kimi `kv_b_proj`, `expand_kv`: per head, the key without rotary part and then the value."""
    return _rows(mixer.num_heads, ("key", mixer.qk_nope_head_dim), ("value", mixer.v_head_dim))


def _kimi(attention: Role, delta: Role) -> Layout:
    """Kimi names the projections of both kinds of layer alike; only the delta layer has a `b_proj`."""
    return lambda mixer: {delta if "b_proj" in dict(mixer.named_children()) else attention: None}


def _gpt2_qkv(mixer: Any) -> dict[Role, RowRanges]:
    """GPT-2 `c_attn`: queries, keys, values, each of the hidden size (PEFT's `lora_B` is [out, r] here too)."""
    return _rows(1, ("query", mixer.split_size), ("key", mixer.split_size), ("value", mixer.split_size))


_GATED_ATTENTION: dict[str, Layout] = {"self_attn.q_proj": _query_and_gate}
_QWEN3_5: dict[str, Layout] = {
    **_GATED_ATTENTION,
    "linear_attn.in_proj_qkv": _gdn_qkv,
    "linear_attn.in_proj_z": _whole("gate"),
    "linear_attn.in_proj_b": _whole("beta"),
    "linear_attn.in_proj_a": _whole("decay"),
    "linear_attn.out_proj": _whole("gdn_output"),
}
_LFM2: dict[str, Layout] = {
    "self_attn.out_proj": _whole("output"),
    "conv.in_proj": _short_conv,
    "conv.out_proj": _whole("gdn_output"),
}

LAYOUTS: dict[str, dict[str, Layout]] = {
    "qwen3_5": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_next": {
        **_GATED_ATTENTION,
        "linear_attn.in_proj_qkvz": _gdn_qkvz,
        "linear_attn.in_proj_ba": _gdn_ba,
        "linear_attn.out_proj": _whole("gdn_output"),
    },
    "olmo_hybrid": {
        "linear_attn.q_proj": _whole("gdn_query"),
        "linear_attn.k_proj": _whole("gdn_key"),
        "linear_attn.v_proj": _whole("gdn_value"),
        "linear_attn.g_proj": _whole("gate"),
        "linear_attn.b_proj": _whole("beta"),
        "linear_attn.a_proj": _whole("decay"),
        "linear_attn.o_proj": _whole("gdn_output"),
    },
    "kimi_linear": {
        "self_attn.q_proj": _kimi("query", "gdn_query"),
        "self_attn.k_proj": _whole("gdn_key"),
        "self_attn.v_proj": _whole("gdn_value"),
        "self_attn.o_proj": _kimi("output", "gdn_output"),
        "self_attn.q_a_proj": _whole("query"),
        "self_attn.q_b_proj": _whole("query"),
        "self_attn.kv_a_proj_with_mqa": _latent_keys_and_values,
        "self_attn.kv_b_proj": _expanded_keys_and_values,
        "self_attn.g_a_proj": _whole("gate"),
        "self_attn.g_b_proj": _whole("gate"),
        "self_attn.b_proj": _whole("beta"),
        "self_attn.forget_gate.f_a_proj": _whole("decay"),
        "self_attn.forget_gate.f_b_proj": _whole("decay"),
    },
    "falcon_h1": {"mamba.in_proj": _mamba2},
    "granitemoehybrid": {"mamba.in_proj": _mamba2},
    "bamba": {"mamba.in_proj": _mamba2},
    "nemotron_h": {"mixer.in_proj": _mamba2},
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "gpt2": {
        "attn.c_attn": _gpt2_qkv,
        "attn.c_proj": _whole("output"),
        "mlp.c_fc": _whole("mlp"),
        "mlp.c_proj": _whole("mlp"),
    },
}
"""By `model_type` of the text model: the projections that their last name alone does not explain."""

ATTENTION_LEAVES: dict[str, Role] = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
"""Roles of projections by the last part of their name, in every architecture not spelled out above."""

MLP_LEAVES = frozenset(
    {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "input_linear", "output_linear"}
)
"""Last names of the linear modules of dense MLPs and shared experts."""

BYPASSED: dict[str, frozenset[str]] = {
    # The fused Mamba-2 kernel takes `out_proj.weight` itself and never calls the module. PEFT (0.21) refuses to
    # adapt it in Falcon-H1 and Nemotron-H; in Granite and Bamba it would accept, and the adapter would be ignored
    # whenever the kernel runs.
    "falcon_h1": frozenset({"mamba.out_proj"}),
    "granitemoehybrid": frozenset({"mamba.out_proj"}),
    "bamba": frozenset({"mamba.out_proj"}),
    "nemotron_h": frozenset({"mixer.out_proj"}),
    # Jamba's time step multiplies with `dt_proj.weight` directly when the kernel runs.
    "jamba": frozenset({"mamba.dt_proj"}),
}
"""By `model_type`: linear modules whose weight is read without calling them, so an adapter there does nothing."""
