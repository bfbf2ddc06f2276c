# SPDX-License-Identifier: Apache-2.0
"""Adapters for the other class and for plain PEFT."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from frozen_peft.adapters import activate_at_invocation
from frozen_peft.merging import export_adapter
from tests.merging.cases import CASES, Case, everything, lora, make_random, preset, save_case
from tests.tiny_models import tiny_model

IDS = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(0))


def same_text_models():
    text, wrapper = tiny_model("qwen3_5_text"), tiny_model("qwen3_5")
    wrapper.model.language_model.load_state_dict(text.model.state_dict())
    wrapper.lm_head.load_state_dict(text.lm_head.state_dict())
    return {"text": text, "wrapper": wrapper}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("layout", ["text", "wrapper"])
@pytest.mark.parametrize(
    "adapt",
    [
        everything("qwen3_5"),
        preset(),
        lora(rank_pattern={"o_proj": 3}, alpha_pattern={r".*layers\.1\.self_attn\.q_proj": 9}),
        lora(modules_to_save=["lm_head"], use_rslora=True),
    ],
)
def test_plain_peft_loads_it_into_the_other_class(layout: str, adapt, tmp_path: Path) -> None:
    trained_on = "wrapper" if layout == "text" else "text"
    adapted = adapt(same_text_models()[trained_on])
    adapted.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "exported", layout)
    plain = same_text_models()[layout]
    before = logits(plain)
    with warnings.catch_warnings():
        # A key that PEFT finds no home for is a warning there.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(plain, tmp_path / "exported")
    wanted = logits(adapted)
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("name", ["experts of qwen3_5_moe_text", "DoRA"])
def test_there_and_back_it_is_the_same_adapter(name: str, tmp_path: Path) -> None:
    base, adapter = save_case(CASES[name], tmp_path)
    export_adapter(adapter, tmp_path / "wrapper", "wrapper")
    export_adapter(tmp_path / "wrapper", tmp_path / "text", "text")
    model_class = type(tiny_model(CASES[name].architecture))
    wanted = logits(PeftModel.from_pretrained(model_class.from_pretrained(base), adapter))
    found = logits(PeftModel.from_pretrained(model_class.from_pretrained(base), tmp_path / "text"))
    assert torch.equal(found, wanted)


def test_an_activated_adapter_keeps_its_invocation(tmp_path: Path) -> None:
    model = lora()(tiny_model("llama"))
    activate_at_invocation(model, [5, 6])
    make_random(model)
    model.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [5, 6]
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "exported")
    ids = IDS.clone()
    ids[:, 20:22] = torch.tensor([5, 6])
    with torch.no_grad():
        found = loaded.eval()(input_ids=ids, use_cache=False).logits
        base = tiny_model("llama")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found[:, :20], base[:, :20], rtol=0, atol=1e-5)
    assert (found[:, 20:] - base[:, 20:]).abs().max() > 1e-2


def test_a_pattern_that_is_none_is_named(tmp_path: Path) -> None:
    _, adapter = save_case(Case("qwen3_5_text", preset()), tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"((": 2}}))
    with pytest.raises(ValueError, match=r"'rank_pattern' of the adapter.* has a key that is no pattern"):
        export_adapter(adapter, tmp_path / "exported", "wrapper")
    assert not (tmp_path / "exported").exists()


def test_a_vision_tower_has_no_place_in_the_text_class(tmp_path: Path) -> None:
    _, adapter = save_case(Case("qwen3_5", lora(target_modules=["q_proj", "qkv"])), tmp_path)
    with pytest.raises(ValueError, match=r"visual.*text model does not have"):
        export_adapter(adapter, tmp_path / "exported", "text")
    assert not (tmp_path / "exported").exists()
