# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every supported architecture, initialised so that every kind of state matters.

transformers' own initialisation makes linear-attention layers forget within a token and attention nearly
uniform: a parity test on such a model passes with the context lost. Here decay is slow (`dt_bias` the inverse
softplus of uniform(0.001, 0.1), `A_log` in [0, 1], FLA's own choice) and weights are of the order of
1/sqrt(fan-in), so that each layer's output is as large as the residual stream it is added to.
`tests/test_reference.py` measures, per architecture, that losing any kind of state shows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 97
SLIDING_WINDOW = 16

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_ATTENTION: dict[str, Any] = {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": _ROPE,
}
_GDN: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_QWEN_HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}


@dataclass(frozen=True)
class _Architecture:
    """What it takes to build one tiny model."""

    model_class: str
    config_class: str
    fields: dict[str, Any] = field(default_factory=dict)
    # Linear modules, by the last part of their name, that PEFT refuses or a kernel reads the weight of.
    unadaptable: tuple[str, ...] = ()


def _architecture(stem: str, *fields: dict[str, Any], **rest: Any) -> _Architecture:
    """Merge `fields` onto the common ones, for a `{stem}ForCausalLM` with a `{stem}Config`."""
    merged = dict(_COMMON)
    for part in fields:
        merged.update(part)
    rest.setdefault("model_class", f"{stem}ForCausalLM")
    rest.setdefault("config_class", f"{stem}Config")
    return _Architecture(fields=merged, **rest)


# PEFT takes these for the experts of older checkpoints (`convert_peft_config_for_transformers`) and puts
# LoRA on the fused expert parameters instead of on the shared expert and the dense layers.
_TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")

ROPE_LIMIT = 64
# A decision of a dozen tokens tells one set of these factors from the other by more than it tells contexts apart.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": ROPE_LIMIT,
    "short_factor": [1.0 + 0.1 * index for index in range(4)],
    "long_factor": [2.0 + 0.5 * index for index in range(4)],
}
_LONG_ATTENTION = {key: value for key, value in _ATTENTION.items() if key != "head_dim"}

_QWEN3_5 = (_ATTENTION, _GDN, _QWEN_HYBRID)
_BUILDERS: dict[str, _Architecture] = {
    "qwen3_5_text": _architecture("Qwen3_5", *_QWEN3_5, config_class="Qwen3_5TextConfig"),
    "qwen3_5": _architecture("Qwen3_5", *_QWEN3_5, model_class="Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe_text": _architecture(
        "Qwen3_5Moe",
        {key: value for key, value in _ATTENTION.items() if key != "intermediate_size"},
        _GDN,
        _QWEN_HYBRID,
        _MOE,
        {"shared_expert_intermediate_size": 24},
        config_class="Qwen3_5MoeTextConfig",
    ),
    "qwen3_next": _architecture(
        "Qwen3Next",
        *_QWEN3_5,
        _MOE,
        {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
        unadaptable=_TAKEN_FOR_EXPERTS,
    ),
    "olmo_hybrid": _architecture(
        "OlmoHybrid",
        {key: value for key, value in _ATTENTION.items() if key != "head_dim"},
        _GDN,
        {"linear_num_key_heads": 4, "layer_types": _QWEN_HYBRID["layer_types"]},
    ),
    "kimi_linear": _architecture(
        "KimiLinear",
        _MOE,
        {
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "linear_head_dim": 16,
            "linear_num_heads": 2,
            "routed_scaling_factor": 1.0,
            "layer_types": _QWEN_HYBRID["layer_types"],
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        },
    ),
    "falcon_h1": _architecture(
        "FalconH1",
        {key: value for key, value in _ATTENTION.items() if key != "head_dim"},
        _MAMBA2,
        {"mamba_d_ssm": 64, "num_hidden_layers": 2},
        unadaptable=("out_proj",),
    ),
    "granitemoehybrid": _architecture(
        "GraniteMoeHybrid",
        {key: value for key, value in _ATTENTION.items() if key != "head_dim"},
        _MAMBA2,
        {
            "layer_types": _QWEN_HYBRID["layer_types"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "attention_multiplier": 8**-0.5,
            "position_embedding_type": "rope",
        },
        unadaptable=("out_proj",),
    ),
    "nemotron_h": _architecture(
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"],
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 64,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        unadaptable=("out_proj",),
    ),
    "lfm2": _architecture(
        "Lfm2",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "rope_parameters": _ROPE,
        },
    ),
    "llama": _architecture("Llama", _ATTENTION),
    "qwen3": _architecture("Qwen3", _ATTENTION),
    # Every layer slides, so four windows of 16 reach 60 tokens back and no further.
    "mistral": _architecture("Mistral", _ATTENTION, {"sliding_window": SLIDING_WINDOW}),
    "gemma3_text": _architecture(
        "Gemma3",
        {key: value for key, value in _ATTENTION.items() if key != "rope_parameters"},
        {
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 16,
        },
        config_class="Gemma3TextConfig",
    ),
    "gpt_oss": _architecture(
        "GptOss",
        _ATTENTION,
        {
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
        },
    ),
    "glm4_moe": _architecture(
        "Glm4Moe",
        _ATTENTION,
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
        },
        unadaptable=_TAKEN_FOR_EXPERTS,
    ),
    "gpt2": _Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
    ),
    "bamba": _architecture(
        "Bamba",
        {key: value for key, value in _ATTENTION.items() if key != "head_dim"},
        _MAMBA2,
        {"attn_layer_indices": [1, 3]},
        unadaptable=("out_proj",),
    ),
    "jamba": _architecture(
        "Jamba",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "recurrent_gemma": _architecture(
        "RecurrentGemma",
        {
            "intermediate_size": 96,
            "num_key_value_heads": 1,
            "attention_window_size": SLIDING_WINDOW,
            "block_types": ["recurrent", "attention"],
            "rope_parameters": _ROPE,
        },
    ),
}

_MLA: dict[str, Any] = {
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "rope_parameters": _ROPE,
}
_MLA_MOE: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_OTHERS: dict[str, _Architecture] = {
    "deepseek_v3": _architecture("DeepseekV3", _MLA, _MLA_MOE, unadaptable=_TAKEN_FOR_EXPERTS),
    "deepseek_v2": _architecture(
        "DeepseekV2", _MLA, _MLA_MOE, {"head_dim": 8, "topk_method": "greedy"}, unadaptable=_TAKEN_FOR_EXPERTS
    ),
    "glm4_moe_lite": _architecture("Glm4MoeLite", _MLA, _MLA_MOE, unadaptable=_TAKEN_FOR_EXPERTS),
    "mistral4": _architecture(
        "Mistral4",
        _MLA,
        _MLA_MOE,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "partial_rotary_factor": 8 / 24,
                "llama_4_scaling_beta": 0.1,
            }
        },
        unadaptable=_TAKEN_FOR_EXPERTS,
    ),
    "longcat_flash": _architecture(
        "LongcatFlash",
        _MLA,
        _MLA_MOE,
        {
            "head_dim": 8,
            "num_layers": 2,
            "moe_topk": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "zero_expert_num": 1,
        },
        # The router's choice has no gradient in transformers.
        unadaptable=(*_TAKEN_FOR_EXPERTS, "classifier"),
    ),
    # Two attentions over each half of the values, which SDPA's segments do not know.
    "diffllama": _architecture("DiffLlama", _ATTENTION),
    "minicpm3": _architecture("MiniCPM3", _MLA),
    "youtu": _architecture("Youtu", _MLA),
    "axk1": _architecture("AXK1", _MLA, _MLA_MOE, unadaptable=_TAKEN_FOR_EXPERTS),
    "bailing_hybrid": _architecture(
        "BailingHybrid",
        _MLA,
        _MLA_MOE,
        {"head_dim": 16, "layer_group_size": 2, "num_local_experts": 4, "num_mtp_layers": 0, "q_lora_rank": None},
        unadaptable=_TAKEN_FOR_EXPERTS,
    ),
}

# How positions are computed depends on a length in these.
_LENGTH_DEPENDENT: dict[str, _Architecture] = {
    "phi3": _architecture(
        "Phi3",
        _LONG_ATTENTION,
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": ROPE_LIMIT},
    ),
    "phimoe": _architecture(
        "Phimoe",
        _LONG_ATTENTION,
        {"num_local_experts": 4, "rope_parameters": _LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.4}},
        # A linear module that returns more than its output.
        unadaptable=("router",),
    ),
    "ministral3": _architecture(
        "Ministral3",
        _ATTENTION,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": ROPE_LIMIT,
                "llama_4_scaling_beta": 0.5,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
    ),
    "llama4_text": _architecture(
        "Llama4",
        _ATTENTION,
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
            "no_rope_layers": [1, 1, 1, 0],
            "attn_temperature_tuning": True,
            "attn_scale": 0.5,
            "floor_scale": ROPE_LIMIT,
        },
        config_class="Llama4TextConfig",
        # A linear module that returns more than its output.
        unadaptable=("router",),
    ),
}

REFUSABLE: tuple[str, ...] = ("bamba", "jamba", "recurrent_gemma")
"""Architectures that transformers itself continues inexactly: exact or refused, never silently wrong."""

ARCHITECTURES: tuple[str, ...] = tuple(name for name in _BUILDERS if name not in REFUSABLE)
"""Architectures whose continuation from a frozen context has to be exact."""


LENGTH_DEPENDENT: tuple[str, ...] = tuple(_LENGTH_DEPENDENT)
"""Architectures that do something else from `ROPE_LIMIT` tokens on."""

LATENT_ATTENTION: tuple[str, ...] = tuple(name for name in _OTHERS if "kv_lora_rank" in _OTHERS[name].fields)
"""Architectures beside those that keep latents in their cache; of the others, kimi_linear does."""

_ATTENTION_ONLY = ("llama", "qwen3", "mistral", "gemma3_text", "gpt_oss", "glm4_moe", "gpt2")
STATES: dict[str, tuple[str, ...]] = {
    name: ("keys_values",) if name in _ATTENTION_ONLY else ("keys_values", "conv", "recurrent")
    for name in ARCHITECTURES
} | {"lfm2": ("keys_values", "conv")}
"""The kinds of state that each architecture keeps of a context."""


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> PreTrainedModel:
    """Build a tiny random model in which every kind of state matters.

    Args:
        name: One of `ARCHITECTURES`, `LATENT_ATTENTION`, `LENGTH_DEPENDENT` or `REFUSABLE`, or "diffllama".
        seed: Fixes every weight; the caller's random state is left as it was.
        dtype: Type of the floating-point weights.
        config_overrides: Fields of the (text) configuration to replace.

    Raises:
        ValueError: `name` is unknown.
    """
    builders = _BUILDERS | _OTHERS | _LENGTH_DEPENDENT
    if name not in builders:
        raise ValueError(f"`name` must be one of {sorted(builders)}, got {name!r}.")
    architecture = builders[name]
    # Copied, since some configurations write into what they are given of rope, which others are given too.
    fields = copy.deepcopy({**architecture.fields, **config_overrides})
    if name == "qwen3_5":
        fields = {
            "text_config": {**fields, "model_type": "qwen3_5_text"},
            "vision_config": _TINY_VISION,
            "tie_word_embeddings": False,
            **dict.fromkeys(("image_token_id", "video_token_id"), VOCAB_SIZE - 1),
            **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), VOCAB_SIZE - 2),
        }
    config = getattr(transformers, architecture.config_class)(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, architecture.model_class)(config)
        make_every_state_matter(model)
    return model.to(dtype).eval()


def add_lora(
    model: PreTrainedModel, *, seed: int = 0, rank: int = 2, keep: Callable[[str], bool] = lambda name: True
) -> PeftModel:
    """Put LoRA on every adaptable linear module of the text model, with both factors random and nonzero.

    Args:
        model: A model of `tiny_model`.
        seed: Fixes the adapter weights.
        rank: Rank of every adapter.
        keep: Says of a linear module, by its full name, whether it gets an adapter.
    """
    unadaptable = _unadaptable(model)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and "visual" not in name
        and name.rpartition(".")[2] not in ("lm_head", *unadaptable)
        and keep(name)
    ]
    fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                # An update of a tenth to a third of the weight it is added to: large enough to be seen in
                # every figure, small enough to leave the model as well conditioned as it was.
                scale = 1.0 if "lora_A" in name else 0.1
                nn.init.normal_(parameter, std=scale / parameter.shape[1] ** 0.5)
    return adapted.eval()


_TINY_VISION: dict[str, Any] = {
    "model_type": "qwen3_5_vision",
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": _COMMON["hidden_size"],
    "num_position_embeddings": 16,
}


def to_double(model: nn.Module) -> nn.Module:
    """The same weights in float64, computed with experts one by one: the grouped kernel has no float64."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_experts_implementation("eager")
    return model.double()


def _unadaptable(model: PreTrainedModel) -> tuple[str, ...]:
    for architecture in (_BUILDERS | _OTHERS | _LENGTH_DEPENDENT).values():
        if type(model).__name__ == architecture.model_class:
            return architecture.unadaptable
    return ()


@torch.no_grad()
def make_every_state_matter(model: PreTrainedModel) -> None:
    """Redraw every weight; what a weight is for is read off its name and shape."""
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        owner = name.split(".")[-2] if "." in name else ""
        if leaf == "A_log":
            nn.init.uniform_(parameter, 0.0, 1.0)
        elif leaf == "dt_bias" or name.endswith("dt_proj.bias"):
            step = torch.empty_like(parameter).uniform_(0.001, 0.1)
            parameter.copy_(step + torch.log(-torch.expm1(-step)))
        elif leaf == "recurrent_param":
            # The RG-LRU's own parametrisation; its initialisation already keeps the state for many tokens.
            continue
        elif "conv" in owner and parameter.ndim == 3:
            nn.init.normal_(parameter, std=0.5)
        elif "embed" in owner or owner in ("wte", "wpe") or leaf == "sinks":
            nn.init.normal_(parameter, std=1.0)
        elif parameter.ndim == 1:
            # Norm weights stay around the value the architecture starts from (0 or 1), biases around 0.
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            fan_in = parameter.shape[0 if owner in _INPUT_FIRST else -1]
            nn.init.normal_(parameter, std=fan_in**-0.5)


# GPT-2's Conv1D keeps its weight as [in, out], unlike nn.Linear.
_INPUT_FIRST = frozenset({"c_attn", "c_proj", "c_fc"})
