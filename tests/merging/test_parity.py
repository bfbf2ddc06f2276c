# SPDX-License-Identifier: Apache-2.0
"""Merged checkpoints, loaded by transformers alone, against the unmerged adapter in PEFT."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from frozen_peft import merge_adapter
from frozen_peft.adapters.role_table import LAYOUTS
from tests.merging.cases import CASES, Case, base_model, everything, lora, preset, save_case, trained_in_4_bit
from tests.tiny_models import tiny_model

SCRIPT = Path(__file__).with_name("plain_logits.py")
QUICK = (
    "qwen3_5_text",
    "qwen3_5",
    "response, fused",
    "tied, head adapted",
    "DoRA, transposed",
    "experts of qwen3_next",
)
# On the weights that training saw, which are those of the base quantized and de-quantized.
IN_4_BIT = {f"{name} in 4 bit": name for name in LAYOUTS}
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))


def plain_logits(folders: Iterable[Path], scratch: Path) -> dict[str, torch.Tensor]:
    """Logits by transformers, in a process that knows nothing of this package."""
    torch.save(IDS, scratch / "ids.pt")
    subprocess.run(
        [sys.executable, SCRIPT, scratch / "ids.pt", scratch / "logits.pt", *folders],
        check=True,
        cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    return torch.load(scratch / "logits.pt")


@torch.no_grad()
def unmerged_logits(base: Path, adapter: Path, model_class: type) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base, and of the base with its adapter."""
    model = model_class.from_pretrained(base).eval()
    without = model(input_ids=IDS, use_cache=False).logits
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    return without, adapted(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def trained_logits(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a model as it was trained."""
    with model.disable_adapter():
        without = model(input_ids=IDS, use_cache=False).logits
    return without, model(input_ids=IDS, use_cache=False).logits


def distances(names: Iterable[str], folder: Path) -> dict[str, tuple[float, float]]:
    """Of each case: relative error of the merged model, and what the adapter does, in the same measure."""
    expected = {}
    for number, name in enumerate(names):
        output = folder / f"merged{number}"
        if name in IN_4_BIT:
            base, adapter, trained = trained_in_4_bit(folder / str(number), IN_4_BIT[name])
            merge_adapter(adapter, output, base, onto="quantized", verify=False)
            expected[name] = trained_logits(trained)
        else:
            base, adapter = save_case(CASES[name], folder / str(number))
            merge_adapter(adapter, output, base, verify=False)
            expected[name] = unmerged_logits(base, adapter, type(base_model(CASES[name].architecture)))
    merged = plain_logits([folder / f"merged{number}" for number in range(len(expected))], folder)
    return {
        name: (
            float((merged[str(folder / f"merged{number}")] - wanted).abs().max() / wanted.abs().max()),
            float((without - wanted).abs().max() / wanted.abs().max()),
        )
        for number, (name, (without, wanted)) in enumerate(expected.items())
    }


def test_merged_model_is_base_and_adapter(tmp_path: Path) -> None:
    check(distances(QUICK, tmp_path))


@pytest.mark.slow
def test_every_architecture_and_kind_of_adapter_merges(tmp_path: Path) -> None:
    check(distances([*(name for name in CASES if name not in QUICK), *IN_4_BIT], tmp_path))


def test_no_architecture_of_the_role_table_is_left_out() -> None:
    assert set(LAYOUTS) <= {case.architecture for case in CASES.values()}


def check(found: dict[str, tuple[float, float]]) -> None:
    assert not {name: error for name, (error, _) in found.items() if error > 1e-5}
    # What the adapter does is seen in each, so a merge that lost it would be, too.
    assert not {name: effect for name, (_, effect) in found.items() if effect < 0.02}


@pytest.mark.parametrize("trained_on", ["qwen3_5_text", "qwen3_5"])
@pytest.mark.parametrize("adapt", [everything("qwen3_5"), preset(), lora(rank_pattern={r"model\.layers\.1\..*": 3})])
def test_adapter_of_one_class_merges_into_the_other(trained_on: str, adapt, tmp_path: Path) -> None:
    """The text model of the wrapper is the text model itself: the merged text weights must be equal."""
    text, wrapper = tiny_model("qwen3_5_text"), tiny_model("qwen3_5")
    wrapper.model.language_model.load_state_dict(text.model.state_dict())
    wrapper.lm_head.load_state_dict(text.lm_head.state_dict())
    for name, model in (("qwen3_5_text", text), ("qwen3_5", wrapper)):
        model.save_pretrained(tmp_path / name)
    adapt(text if trained_on == "qwen3_5_text" else wrapper).save_pretrained(tmp_path / "adapter")
    merged = {}
    for name in ("qwen3_5_text", "qwen3_5"):
        merge_adapter(tmp_path / "adapter", tmp_path / f"merged {name}", tmp_path / name, verify=False)
        merged[name] = load_file(tmp_path / f"merged {name}" / "model.safetensors")
    base = load_file(tmp_path / "qwen3_5_text" / "model.safetensors")
    changed = [name for name, tensor in merged["qwen3_5_text"].items() if not torch.equal(tensor, base[name])]
    assert changed
    for name, tensor in merged["qwen3_5_text"].items():
        assert torch.equal(tensor, merged["qwen3_5"][name.replace("model.", "model.language_model.", 1)])


def test_text_class_reads_a_merged_wrapper(tmp_path: Path) -> None:
    base, adapter = save_case(Case("qwen3_5", preset()), tmp_path)
    merge_adapter(adapter, tmp_path / "merged", base, verify=False)
    expected = unmerged_logits(base, adapter, type(tiny_model("qwen3_5")))[1]
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = text(input_ids=IDS, use_cache=False).logits
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_no_adapter_changes_is_copied_byte_for_byte(tmp_path: Path) -> None:
    base, adapter = save_case(Case("qwen3_5", preset()), tmp_path)
    report = merge_adapter(adapter, tmp_path / "merged", base, verify=False)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    changed = 0
    for name in files:
        before, after = load_file(base / name), load_file(tmp_path / "merged" / name)
        assert list(before) == list(after)
        changed += sum(not torch.equal(before[key], after[key]) for key in before)
    assert changed == report["merged_parameters"] > 0
    index = "model.safetensors.index.json"
    assert (base / index).read_text().split('"weight_map"')[1] == (tmp_path / "merged" / index).read_text().split(
        '"weight_map"'
    )[1].removesuffix("\n") + ("\n" if (base / index).read_text().endswith("\n") else "")


@pytest.mark.parametrize("dtype", ["bf16", "float16", torch.float16])
def test_weights_are_cast_once(dtype: str | torch.dtype, tmp_path: Path) -> None:
    base, adapter = save_case(Case("llama", lora()), tmp_path)
    merge_adapter(adapter, tmp_path / "exact", base, verify=False)
    report = merge_adapter(adapter, tmp_path / "cast", base, dtype=dtype, verify=False)
    assert report["dtype"] == ("bf16" if dtype == "bf16" else "fp16")
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float16
    for path in (tmp_path / "exact").glob("*.safetensors"):
        exact, cast = load_file(path), load_file(tmp_path / "cast" / path.name)
        assert exact.keys() == cast.keys()
        for name, tensor in exact.items():
            assert torch.equal(cast[name], tensor.to(wanted)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cast").dtype == wanted


def test_a_16_bit_base_is_updated_in_float32(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapted = lora()(model)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", verify=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in merged.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name]
        if f"{prefix}.lora_A.weight" in factors:
            up, down = factors[f"{prefix}.lora_B.weight"].float(), factors[f"{prefix}.lora_A.weight"].float()
            expected = (base[name].float() + 2.0 * (up @ down)).bfloat16()
            assert not torch.equal(expected, base[name])
        assert torch.equal(tensor, expected), name
