# SPDX-License-Identifier: Apache-2.0
"""Bases and adapters to merge, each built by transformers and PEFT alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from frozen_peft.adapters import keep_linear4bit_trainable, lora_config, quantization_config, restrict_adapter_rows
from frozen_peft.merging import save_base_record
from tests.tiny_models import (
    ARCHITECTURES,
    REFUSABLE,
    VOCAB_SIZE,
    add_lora,
    make_every_state_matter,
    tiny_model,
)

# Small enough that every base comes in several shards.
SHARD_SIZE = "60KB"
# A kernel of Jamba reads this weight without calling the module.
BYPASSED = {"jamba": ("dt_proj",)}


@dataclass(frozen=True)
class Case:
    """A base and an adapter on it."""

    architecture: str
    adapt: Callable[[PreTrainedModel], PeftModel]
    base_fields: dict[str, Any] = field(default_factory=dict)


def make_random(model: PeftModel, seed: int = 0) -> PeftModel:
    """Draws what is trained at random, large enough to be seen in every figure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name or ".lora_A" in name or ".lora_B" in name:
                scale = 1.0 if "_A" in name else 0.1
                nn.init.normal_(parameter, std=scale / max(parameter.shape[-1], 1) ** 0.5)
            elif "magnitude" in name:
                parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def lora(**fields: Any) -> Callable[[PreTrainedModel], PeftModel]:
    """Adapts with a plain PEFT configuration."""
    defaults = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj"]}
    return lambda model: make_random(get_peft_model(model, LoraConfig(**{**defaults, **fields})))


def preset(**fields: Any) -> Callable[[PreTrainedModel], PeftModel]:
    """Adapts as this package does, with the rows that are not adapted at zero."""

    def adapt(model: PreTrainedModel) -> PeftModel:
        wrapped = get_peft_model(model, lora_config(model, r=2, lora_alpha=4, **fields))
        before = {name: parameter.clone() for name, parameter in wrapped.named_parameters() if "lora_B" in name}
        restrict_adapter_rows(wrapped)
        make_random(wrapped)
        # One step of training finds out which rows move.
        rows = {name: torch.zeros(len(parameter), dtype=torch.bool) for name, parameter in before.items()}
        wrapped.train()
        ids = torch.randint(3, 90, (1, 24))
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, parameter in wrapped.named_parameters():
            if name in rows:
                parameter.data[~parameter.grad.ne(0).any(dim=1)] = 0.0
        return wrapped.eval()

    return adapt


def everything(architecture: str) -> Callable[[PreTrainedModel], PeftModel]:
    """Adapts every linear module that a forward calls."""
    bypassed = BYPASSED.get(architecture, ())
    return lambda model: add_lora(model, keep=lambda name: name.rpartition(".")[2] not in bypassed)


_SPARSE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_SPARSE_TEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "tie_word_embeddings": False,
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def _lfm2_moe() -> PreTrainedModel:
    fields = {"intermediate_size": 48, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
    return transformers.Lfm2MoeForCausalLM(transformers.Lfm2MoeConfig(**_SPARSE, **fields))


def _qwen3_5_moe() -> PreTrainedModel:
    config = transformers.Qwen3_5MoeConfig(
        text_config={**_SPARSE, **_SPARSE_TEXT},
        vision_config={**_VISION, "num_position_embeddings": 16},
        tie_word_embeddings=False,
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


# Of the role table, and not among the models of the other tests.
RELATIVES = {"lfm2_moe": _lfm2_moe, "qwen3_5_moe": _qwen3_5_moe}


def base_model(architecture: str, **fields: Any) -> PreTrainedModel:
    """A tiny model, without adapters."""
    if architecture not in RELATIVES:
        return tiny_model(architecture, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RELATIVES[architecture]()
        make_every_state_matter(model)
    return model.eval()


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES: dict[str, Case] = {
    **{name: Case(name, everything(name)) for name in (*ARCHITECTURES, *REFUSABLE)},
    **{name: Case(name, preset()) for name in RELATIVES},
    "response": Case("qwen3_5_text", preset()),
    "response of a wrapper": Case("qwen3_5", preset()),
    "response, fused": Case("qwen3_next", preset()),
    "response, Mamba-2": Case("nemotron_h", preset()),
    "one role of a fused projection": Case("gpt2", preset(roles=["value"])),
    "tied": Case("llama", lora(), {"tie_word_embeddings": True}),
    "tied, head adapted": Case("llama", lora(target_modules=["q_proj", "lm_head"]), {"tie_word_embeddings": True}),
    "tied, embedding adapted": Case(
        "llama", lora(target_modules=["q_proj", "embed_tokens"]), {"tie_word_embeddings": True}
    ),
    "tied, head trained": Case("qwen3", lora(modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
    "tied, some tokens trained": Case(
        "llama", lora(trainable_token_indices=[3, 5, 96]), {"tie_word_embeddings": True}
    ),
    "tied, kept tied": Case(
        "llama",
        lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        {"tie_word_embeddings": True},
    ),
    "some tokens trained": Case("llama", lora(trainable_token_indices=[3, 5, 96])),
    "norms trained": Case("llama", lora(modules_to_save=["norm", "input_layernorm"])),
    "rank-stabilized": Case("llama", lora(use_rslora=True, r=3)),
    "ranks and alphas by module": Case(
        "qwen3_5_text",
        lora(
            target_modules=["q_proj", "o_proj", "in_proj_z"],
            rank_pattern={"o_proj": 3, r"model.layers.1.self_attn.q_proj": 4},
            alpha_pattern={r".*in_proj_z": 7},
        ),
    ),
    "DoRA": Case("qwen3_5_text", lora(use_dora=True, target_modules=["q_proj", "o_proj", "in_proj_z", "up_proj"])),
    "DoRA, transposed": Case("gpt2", lora(use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "bias of lora_B": Case("gpt_oss", lora(lora_bias=True)),
    "biases trained": Case("gpt_oss", lora(bias="all")),
    "biases of adapted modules trained": Case("gpt_oss", lora(bias="lora_only")),
    **{
        f"experts of {name}": Case(name, lora(**EXPERTS))
        for name in ("qwen3_5_moe_text", "qwen3_next", "kimi_linear", "glm4_moe", "gpt_oss", *RELATIVES)
    },
    "experts of nemotron_h": Case(
        "nemotron_h", lora(target_modules=["q_proj"], target_parameters=["experts.up_proj", "experts.down_proj"])
    ),
    "experts of jamba": Case("jamba", lora(**{**EXPERTS, "target_modules": ["q_proj"]})),
}


def save_case(case: Case, folder: Path, **save: Any) -> tuple[Path, Path]:
    """Writes base and adapter.

    Returns:
        Their folders.
    """
    base, adapter = folder / "base", folder / "adapter"
    model = base_model(case.architecture, **case.base_fields)
    model.save_pretrained(base, **{"max_shard_size": SHARD_SIZE, **save})
    case.adapt(model).save_pretrained(adapter)
    return base, adapter


def trained_in_4_bit(
    folder: Path, architecture: str = "qwen3_5_text", adapt: Callable[[PreTrainedModel], PeftModel] | None = None
) -> tuple[Path, Path, PeftModel]:
    """Writes a base and a random adapter on its 4-bit form.

    Returns:
        Their folders, and the adapted 4-bit model.
    """
    base, adapter = folder / "base", folder / "adapter"
    model = base_model(architecture)
    model.save_pretrained(base)
    in_4_bit = type(model).from_pretrained(
        base,
        quantization_config=quantization_config(str(base), bnb_4bit_compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    keep_linear4bit_trainable(in_4_bit)
    adapted = (adapt or preset())(in_4_bit)
    adapted.save_pretrained(adapter)
    save_base_record(adapted, adapter)
    return base, adapter, adapted.eval()
