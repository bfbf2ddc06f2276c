# SPDX-License-Identifier: Apache-2.0
"""Adapters that change their base first: what takes the model with adapters off for its base has the base, or none."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig

from frozen_peft import FrozenContextTrainer, merge_adapter
from frozen_peft.adapters import initialisation
from frozen_peft.evaluation import compare_probes, load_model, score_probes
from frozen_peft.merging import save_base_record
from frozen_peft.report.examples import ExampleSettings, make_examples
from tests.distillation.pairs import Loss, Pair, as_dataset, pairs
from tests.evaluation.test_probe_scores import PROBES
from tests.reference import relative_error
from tests.tiny_models import tiny_model
from tests.training.runs import config, fresh_lora, train, word_tokenizer

IDS = torch.arange(3, 40)[None]
TARGETS = ["q_proj", "o_proj"]
DISTILL = Loss().fields
# One for each way in which peft 0.21 changes a base that needs neither data nor another package.
CHANGING: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "OLoRA"},
    {"kasa_config": KasaConfig()},
]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", **fields)


def checkpoint(folder: Path, **fields: Any) -> str:
    tiny_model("llama", **fields).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("fields", CHANGING, ids=lambda fields: str(*fields.values()))
def test_the_base_that_is_gone_is_nobodys_teacher(fields: dict[str, Any], tmp_path: Path) -> None:
    """Given as a configuration and as a model. By plain PEFT: the model without its adapters is another."""
    base = logits(tiny_model("llama"))
    model = get_peft_model(tiny_model("llama"), lora(**fields))
    with model.disable_adapter():
        assert (logits(model) - base).abs().max() > 0.1
    refused = rf"teacher, and with its adapters off.*adapter `default` has changed.*{next(iter(fields))}="
    rows = as_dataset(pairs()[:2])
    with pytest.raises(ValueError, match=refused):
        FrozenContextTrainer(model, config(tmp_path, **DISTILL), train_dataset=rows, processing_class=word_tokenizer())
    with pytest.raises(ValueError, match=refused):
        FrozenContextTrainer(checkpoint(tmp_path), config(tmp_path, **DISTILL), None, rows, peft_config=lora(**fields))


def test_contexts_are_not_encoded_by_what_is_left_of_the_base(tmp_path: Path) -> None:
    args = config(tmp_path, tier=2, context_adapters=False)
    with pytest.raises(ValueError, match=r"`context_adapters=False` encodes contexts by the base.*'pissa'"):
        FrozenContextTrainer(
            checkpoint(tmp_path), args, None, as_dataset(pairs()[:2]), peft_config=lora(init_lora_weights="pissa")
        )


def test_an_adapter_that_is_not_active_has_changed_the_base_too(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), lora(init_lora_weights="olora"), adapter_name="first")
    model.add_adapter("second", lora())
    model.set_adapter("second")
    with pytest.raises(ValueError, match="adapter `first` has changed"):
        FrozenContextTrainer(
            model, config(tmp_path, **DISTILL), None, as_dataset(pairs()[:2]), processing_class=word_tokenizer()
        )
    with pytest.raises(ValueError, match="adapter `first` has changed"):
        score_probes(model, word_tokenizer(), PROBES[:1], adapters=False)


def test_a_change_of_the_base_shows_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialisation, "KEEPS_BASE", (*initialisation.KEEPS_BASE, "pissa"))
    with pytest.raises(ValueError, match=r"an adapter has changed the base's weight in `.*layers\.0\."):
        FrozenContextTrainer(
            tiny_model("llama"),
            config(tmp_path, **DISTILL),
            None,
            as_dataset(pairs()[:2]),
            processing_class=word_tokenizer(),
            peft_config=lora(init_lora_weights="pissa"),
        )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "fields",
    [
        *({"init_lora_weights": kind} for kind in ("gaussian", "orthogonal", "mica")),
        {"lora_bias": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 6, 7]},
    ],
    ids=lambda fields: str(*fields.items()),
)
def test_with_its_adapters_off_any_other_model_is_its_base(fields: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """Nothing is stripped, so before the first step teacher and student agree; after steps the teacher is the base."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    base = logits(model)
    rows = [Pair(pair.teacher, pair.teacher) for pair in pairs()[:2]]
    arguments = config(tmp_path, **DISTILL, learning_rate=1.0, max_steps=2)
    run = train(FrozenContextTrainer, model, arguments, as_dataset(rows), peft_config=lora(**fields))
    assert abs(run.losses[0]) < 1e-5
    trained = run.trainer.model.eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert relative_error(logits(trained), base) > 0.01
    with trained.disable_adapter():
        assert relative_error(logits(trained), base) <= 1e-5


def saved(folder: Path, **fields: Any) -> Path:
    """A trained adapter as plain PEFT writes it, its base beside it."""
    model = fresh_lora(tiny_model("llama"), **fields)
    model.peft_config["default"].base_model_name_or_path = checkpoint(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    save_base_record(model, folder / "adapter")
    return folder / "adapter"


def test_a_loaded_adapter_scores_and_its_base_is_not_made_up(tmp_path: Path) -> None:
    """PEFT subtracts the same from the base again, so that the adapted model is the trained one."""
    adapter = saved(tmp_path, init_lora_weights="pissa")
    base = str(tmp_path / "base")
    model, tokenizer = load_model(base, str(adapter))
    plain = PeftModel.from_pretrained(tiny_model("llama"), adapter).eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert score_probes(model, tokenizer, PROBES[:2]).scores
    with pytest.raises(ValueError, match=r"base model's figures are wanted.*init_lora_weights='pissa'"):
        compare_probes(model, tokenizer, PROBES[:2], ["given"])
    rows = [{"prompt": [{"role": "user", "content": "w1 w2 w3"}]}]
    examples = make_examples(model, tokenizer, rows, ExampleSettings(1, max_new_tokens=4))
    assert any("base: it is no longer there" in note for note in examples["notes"])
    assert examples["examples"][0]["decisions"]["base"] is None
    assert examples["examples"][0]["decisions"]["trained"] is not None


def test_biases_of_an_adapter_are_not_the_bases() -> None:
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, bias="all"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.add_(1.0)
    with pytest.raises(ValueError, match=r"biases of its own in place of the base's \(`bias='all'`\)"):
        compare_probes(model, word_tokenizer(), PROBES[:1], ["given"])


def test_a_base_that_cannot_be_changed_again_is_not_scored(tmp_path: Path) -> None:
    """A decomposition at random is another one when PEFT makes it again, and the loaded model not the trained one."""
    adapter = saved(tmp_path, init_lora_weights="pissa_niter_1")
    base, record = str(tmp_path / "base"), adapter / "base_record.json"
    with pytest.raises(ValueError, match=r"loading it did not repeat that: value .* and was"):
        load_model(base, str(adapter))
    record.unlink()
    with pytest.raises(ValueError, match="drawn at random, and nothing beside the adapter"):
        load_model(base, str(adapter))
    with pytest.raises(ValueError, match="in 4 bit it comes out as another one"):
        load_model(base, str(adapter), load_in_4bit=True)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "lora_ga"}))
    with pytest.raises(ValueError, match="made from data that the adapter's folder does not hold"):
        load_model(base, str(adapter))


def test_a_run_does_not_go_on_over_another_base(tmp_path: Path) -> None:
    """What PiSSA leaves of the base is always the same; what is drawn at random, with TRL's seed alone."""
    base, rows = checkpoint(tmp_path), as_dataset(pairs()[:2])
    for kind in ("pissa", "pissa_niter_1"):
        folder = tmp_path / kind
        fields = {"save_strategy": "steps", "save_steps": 1, "model_init_kwargs": {"dtype": "float32"}}
        arguments = config(folder, max_steps=1, **fields)
        train(FrozenContextTrainer, base, arguments, rows, peft_config=lora(init_lora_weights=kind))
        arguments.max_steps, arguments.seed = 2, 7
        with pytest.raises(ValueError, match="did not repeat that: value") if "niter" in kind else nullcontext():
            train(FrozenContextTrainer, base, arguments, rows, peft_config=lora(init_lora_weights=kind), resume="auto")


def test_minor_components_merge(tmp_path: Path) -> None:
    """MiCA leaves the base alone: merged it is what PEFT's own model is."""
    adapter = saved(tmp_path, init_lora_weights="mica")
    merge_adapter(adapter, tmp_path / "merged", verify=False)
    merged, _ = load_model(str(tmp_path / "merged"))
    plain = PeftModel.from_pretrained(tiny_model("llama"), adapter).eval()
    assert (logits(merged) - logits(tiny_model("llama"))).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-4, atol=1e-5)
