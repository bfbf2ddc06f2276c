# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one model, against their updates computed by hand."""

import zlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.merge_utils import dare_linear, dare_ties, ties
from safetensors.torch import load_file

from frozen_peft import merge_adapter
from tests.merging.cases import make_random
from tests.tiny_models import tiny_model

TARGETS = (["q_proj", "o_proj"], ["q_proj", "v_proj"])


def two_adapters(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder / "base")
    for number, targets in enumerate(TARGETS):
        config = LoraConfig(r=2 + number, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        make_random(get_peft_model(tiny_model("llama"), config), seed=number).save_pretrained(folder / f"a{number}")


def differences(folder: Path, name: str) -> list[torch.Tensor]:
    """The updates of one weight, of the adapters that have one."""
    found = []
    for number in range(2):
        factors = load_file(folder / f"a{number}" / "adapter_model.safetensors")
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in factors:
            product = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
            found.append(5 / (2 + number) * product)
    return found


def expected(folder: Path, combine) -> dict[str, torch.Tensor]:
    base = load_file(folder / "base" / "model.safetensors")
    weights = {"q_proj": [0.75, -0.5], "o_proj": [0.75], "v_proj": [-0.5]}
    for name in base:
        kind = name.split(".")[-2]
        if kind in weights:
            base[name] = base[name] + combine(name, differences(folder, name), torch.tensor(weights[kind]))
    return base


def seeded(function, density: float):
    def combine(name: str, updates: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((zlib.crc32(name.encode()) << 20) ^ 3)
            return function(updates, weights, density)

    return combine


COMBINE = {
    "linear": lambda name, updates, weights: sum(w * update for w, update in zip(weights, updates, strict=True)),
    "ties": lambda name, updates, weights: ties(updates, weights, 0.4),
    "dare_linear": seeded(dare_linear, 0.4),
    "dare_ties": seeded(dare_ties, 0.4),
}


@pytest.mark.parametrize("combination", COMBINE)
def test_updates_are_combined_matrix_by_matrix(combination: str, tmp_path: Path) -> None:
    two_adapters(tmp_path)
    report = merge_adapter(
        [tmp_path / "a0", tmp_path / "a1"],
        tmp_path / "merged",
        tmp_path / "base",
        weights=[0.75, -0.5],
        combination=combination,
        density=None if combination == "linear" else 0.4,
        seed=3,
        verify=True,
    )
    assert report["combination"] == combination
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, tensor in expected(tmp_path, COMBINE[combination]).items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(merged[name], base[name]) == (name.split(".")[-2] not in ("q_proj", "o_proj", "v_proj"))
    # PEFT can add adapters up unmerged; of the others there is no such model.
    compared = "log_probability_difference" in report["verification"]
    assert compared == (combination == "linear")
    if compared:
        assert report["verification"]["log_probability_difference"]["max"] < 1e-4


def test_one_adapter_may_have_a_weight(tmp_path: Path) -> None:
    two_adapters(tmp_path)
    report = merge_adapter(tmp_path / "a0", tmp_path / "merged", tmp_path / "base", weights=[0.5], verify=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = load_file(tmp_path / "base" / "model.safetensors")[name] + 0.5 * differences(tmp_path, name)[0]
    torch.testing.assert_close(load_file(tmp_path / "merged" / "model.safetensors")[name], wanted)
    assert report["verification"]["log_probability_difference"]["max"] < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": [1.0]}, "one number for each of 2"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"combination": "average"}, "must be one of"),
        ({"combination": "ties"}, "needs a `density`"),
        ({"combination": "dare_ties", "density": 1.5}, "needs a `density`"),
        ({"density": 0.5}, "has no effect"),
        ({"dtype": torch.float64}, r"`dtype` must be one of .*'float32'\] or a dtype.*got torch\.float64"),
    ],
)
def test_choices_that_cannot_be_used(fields, message: str, tmp_path: Path) -> None:
    two_adapters(tmp_path)
    with pytest.raises(ValueError, match=message):
        merge_adapter([tmp_path / "a0", tmp_path / "a1"], tmp_path / "merged", tmp_path / "base", **fields)
    assert not (tmp_path / "merged").exists()
