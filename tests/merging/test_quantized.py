# SPDX-License-Identifier: Apache-2.0
"""Adapters that were trained on a 4-bit base, merged onto its own weights and onto those that they saw."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from frozen_peft import merge_adapter
from frozen_peft.merging import save_base_record
from tests.merging.cases import Case, lora, preset, save_case, trained_in_4_bit
from tests.tiny_models import tiny_model


def quantized_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """De-quantized by bitsandbytes, by their names in the checkpoint."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
            found[f"{name.replace('.base_layer', '')}.weight"] = weight
    return found


def test_merged_onto_what_it_saw_it_is_the_trained_model(tmp_path: Path) -> None:
    """One architecture of those that `test_parity` loads by transformers alone."""
    base, adapter, trained = trained_in_4_bit(tmp_path)
    report = merge_adapter(adapter, tmp_path / "merged", base, onto="quantized", verify=False)
    assert report["onto"] == "quantized"
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    model = type(trained.get_base_model()).from_pretrained(tmp_path / "merged").eval()
    plain = type(model).from_pretrained(base).eval()
    with torch.no_grad():
        wanted = trained(input_ids=ids, use_cache=False).logits
        found = model(input_ids=ids, use_cache=False).logits
        unquantized = PeftModel.from_pretrained(plain, adapter)(input_ids=ids, use_cache=False).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # The base's own weights are another model.
    assert (unquantized - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_weights_without_adapter_are_those_it_saw_too(tmp_path: Path) -> None:
    base, adapter, trained = trained_in_4_bit(tmp_path, adapt=lora(target_modules=["q_proj"]))
    merge_adapter(adapter, tmp_path / "merged", base, onto="quantized", verify=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    seen = quantized_weights(trained)
    assert len(seen) > 10
    for name, tensor in merged.items():
        if "q_proj" not in name:
            assert torch.equal(tensor, seen.get(name, original[name])), name


def test_by_default_it_is_added_to_the_base_itself(tmp_path: Path) -> None:
    base, adapter, _ = trained_in_4_bit(tmp_path)
    merge_adapter(adapter, tmp_path / "merged", base, verify=False)
    plain = type(tiny_model("qwen3_5_text")).from_pretrained(base).eval()
    merged = type(plain).from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(plain, adapter)(input_ids=ids, use_cache=False).logits
        found = merged(input_ids=ids, use_cache=False).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_both_are_verified_against_what_was_trained(onto: str, tmp_path: Path) -> None:
    base, adapter, _ = trained_in_4_bit(tmp_path)
    report = merge_adapter(adapter, tmp_path / "merged", base, onto=onto, verify=True)
    assert report["onto"] == onto
    assert report["verification"]["log_probability_difference"]["max"] < 1e-4
    assert report["verification"]["adapter_effect"]["mean"] > 0.1


def test_settings_are_assumed_and_said_where_training_wrote_none(tmp_path: Path) -> None:
    base, adapter = save_case(Case("qwen3_5_text", preset()), tmp_path)
    report = merge_adapter(adapter, tmp_path / "merged", base, onto="quantized", verify=False)
    assert report["onto"] == "quantized, by this package's own settings"


def test_an_adapter_of_a_16_bit_base_has_no_quantized_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    adapted = lora()(model)
    adapted.save_pretrained(tmp_path / "adapter")
    save_base_record(adapted, tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained on a base that was not quantized"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", onto="quantized", verify=False)
