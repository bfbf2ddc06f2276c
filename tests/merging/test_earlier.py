# SPDX-License-Identifier: Apache-2.0
"""What was written before is read: adapters and records of their base merge to the very weights of then."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from frozen_peft import merge_adapter
from frozen_peft.merging import load_merged

# `adapter_config.json` and `base_record.json` as they were written before merging read checkpoints by safetensors.
EARLIER = Path(__file__).with_name("earlier")
# Of the weights that were merged then.
DIGEST = "02514219e61bdd625ddf0b29d4cbf255ecfaeedd8e91f08bad626887e823653c"


def numbers(shape: torch.Size, step: int) -> torch.Tensor:
    """Values that every type has exactly."""
    return (((torch.arange(shape.numel()) * step) % 101 - 50) / 64).reshape(shape)


def write_base(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for step, parameter in enumerate(model.parameters(), start=3):
            parameter.copy_(numbers(parameter.shape, step))
    model.save_pretrained(folder)


def write_adapter(folder: Path) -> None:
    shutil.copytree(EARLIER, folder)
    factors = {}
    for step, name in enumerate(("q_proj.lora_A", "q_proj.lora_B", "o_proj.lora_A", "o_proj.lora_B"), start=17):
        shape = torch.Size((1, 8) if name.endswith("A") else (8, 1))
        factors[f"base_model.model.model.layers.0.self_attn.{name}.weight"] = numbers(shape, step) / 4
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_an_adapter_and_a_record_of_before_merge_as_they_did(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", verify=True)
    assert report["base_tensors_compared"] == 8
    assert digest(tmp_path / "merged") == DIGEST
    assert digest(tmp_path / "merged") != digest(tmp_path / "base")
    assert load_merged(tmp_path / "merged").dtype == torch.bfloat16


def test_a_record_of_before_tells_another_base(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"] * 2
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"value \d+ of `layers\.0\.mlp\.up_proj\.weight` is .* in training"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", verify=False)
