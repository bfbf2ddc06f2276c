# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from peft import get_peft_model
from transformers import PreTrainedModel

from frozen_peft.adapters import (
    find_roles,
    keep_linear4bit_trainable,
    lora_config,
    quantization_config,
    restrict_adapter_rows,
)
from tests.tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model


def in_4bit(name: str, path: Path, dtype: torch.dtype = torch.bfloat16, **overrides: int) -> PreTrainedModel:
    model = tiny_model(name, **overrides)
    model.save_pretrained(path)
    config = quantization_config(str(path), bnb_4bit_compute_dtype=dtype)
    return type(model).from_pretrained(path, quantization_config=config, dtype=dtype)


def quantized_names(model: PreTrainedModel) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def bytes_of_4bit(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The packed weights and their block scales."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            found[name] = module.weight.detach().clone()
            found[f"{name}.absmax"] = state.absmax.clone()
            found[f"{name}.state2"] = state.state2.absmax.clone()
    return found


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_defaults_and_overrides() -> None:
    config = quantization_config(tiny_model("qwen3_5_text"))
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert config.llm_int8_skip_modules == ["linear_attn.in_proj_a", "linear_attn.in_proj_b", "lm_head"]

    config = quantization_config(
        tiny_model("qwen3_5_text"), bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["o_proj"]
    )
    assert config.bnb_4bit_compute_dtype is torch.float32
    assert {"o_proj", "lm_head", "linear_attn.in_proj_a"} <= set(config.llm_int8_skip_modules)


def test_tied_embeddings_are_kept_as_transformers_does() -> None:
    assert (
        "model.embed_tokens"
        in quantization_config(tiny_model("llama", tie_word_embeddings=True)).llm_int8_skip_modules
    )


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_5", "qwen3_next", "olmo_hybrid", "kimi_linear", "nemotron_h"])
def test_beta_decay_and_head_stay_in_16_bit(name: str, tmp_path: Path) -> None:
    reference = tiny_model(name)
    by_module: dict[str, set[str]] = {}
    for match in find_roles(reference):
        by_module.setdefault(match.module, set()).add(match.role)
    sensitive = {module for module, roles in by_module.items() if roles <= {"beta", "decay"}}
    quantized = quantized_names(in_4bit(name, tmp_path))

    linears = {key for key, module in reference.named_modules() if type(module) is torch.nn.Linear}
    kept = linears - quantized
    assert sensitive <= kept
    bypassed = {key for key in kept if name == "nemotron_h" and key.endswith("mixer.out_proj")}
    single_output = {key for key in kept if key.endswith("shared_expert_gate")}
    assert kept == sensitive | bypassed | single_output | {"lm_head"}


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "gpt2"])
def test_4bit_bytes_survive_evaluation_and_training_and_gradients_are_right(name: str, tmp_path: Path) -> None:
    dtype = torch.float32
    base = in_4bit(name, tmp_path, dtype)
    num_layers = len(quantized_names(base))
    assert keep_linear4bit_trainable(base) == num_layers
    before = bytes_of_4bit(base)

    model = get_peft_model(base, lora_config(base, r=2))
    restrict_adapter_rows(model)
    assert keep_linear4bit_trainable(model) == num_layers
    # The same model in full precision, with the values that the 4-bit weights stand for.
    reference_base = tiny_model(name)
    with torch.no_grad():
        for key, module in base.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                target = reference_base.get_submodule(key.replace(".base_layer", "")).weight
                weight = dequantize_4bit(module.weight, module.weight.quant_state).to(dtype)
                target.copy_(weight.T if name == "gpt2" else weight)
    reference = get_peft_model(reference_base, lora_config(reference_base, r=2))
    with torch.no_grad():
        weights = dict(reference.named_parameters())
        for key, weight in model.named_parameters():
            if "lora_" in key:
                if "lora_B" in key:
                    weight.normal_(std=0.1)
                weights[key].copy_(weight)

    input_ids = torch.randint(VOCAB_SIZE, (2, 9))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            evaluated = model(input_ids).logits
        model.train()
        output = model(input_ids, labels=input_ids)
        expected = reference(input_ids, labels=input_ids)
        torch.testing.assert_close(evaluated, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
        output.loss.backward()
        expected.loss.backward()
        compared = 0
        for key, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" in key:
                torch.testing.assert_close(weight.grad, weights[key].grad, atol=1e-5, rtol=1e-3)
                compared += 1
        assert compared
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_" in key:
                    weights[key].copy_(weight)
        reference.zero_grad()
    assert_same(before, {key.replace(".base_layer", ""): value for key, value in bytes_of_4bit(base).items()})


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks only on a CPU with AVX512-BF16")
def test_without_the_guard_an_evaluation_forward_ends_training(tmp_path: Path) -> None:
    model = in_4bit("llama", tmp_path, hidden_size=64).eval()
    before = bytes_of_4bit(model)
    # The first projection is 64 by 64, so it is repacked; the MLP with its 48 rows fails a little later.
    with torch.no_grad(), pytest.raises(AssertionError, match="N must be divisible by block_n"):
        model(torch.randint(VOCAB_SIZE, (1, 5)))
    first = model.model.layers[0].self_attn.q_proj
    assert not torch.equal(first.weight.flatten(), before["model.layers.0.self_attn.q_proj"].flatten())

    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj was repacked.*Load the model again"):
        keep_linear4bit_trainable(model)


def test_nothing_to_guard_without_4bit_layers() -> None:
    assert keep_linear4bit_trainable(tiny_model("llama")) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_a_quantization_configuration(name: str) -> None:
    assert "lm_head" in quantization_config(tiny_model(name).config).llm_int8_skip_modules
