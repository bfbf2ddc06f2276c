# SPDX-License-Identifier: Apache-2.0
"""What a step leaves as it was: everything but the adapters."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from frozen_peft import FrozenContextTrainer, lora_config
from tests.reference import Sample, num_labels, reference_gradients, reference_logprobs, token_logprobs
from tests.tiny_models import tiny_model
from tests.training.runs import (
    adapted,
    as_dataset,
    assert_trained_as,
    config,
    fresh_lora,
    samples,
    train,
    train_in_float64,
    word_tokenizer,
)

ROWS = samples()


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "qwen3_next", "qwen3_5_moe_text"])
def test_the_trainable_weights_are_the_adapters(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    before = {key: weight.clone() for key, weight in base.state_dict().items()}
    run = train(FrozenContextTrainer, base, config(tmp_path), as_dataset(ROWS), peft_config=lora_config(base, r=2))
    model = run.trainer.model
    assert run.weights.keys() == {key for key, _ in model.named_parameters() if ".lora_" in key}
    optimized = {id(weight) for group in run.trainer.optimizer.param_groups for weight in group["params"]}
    assert optimized == {id(weight) for weight in model.parameters() if weight.requires_grad}
    after = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for key, weight in model.state_dict().items()
        if ".lora_" not in key
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


def flags(model: nn.Module) -> dict[str, Any]:
    """Everything about a model's modules that a step might leave behind."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            getattr(module, "gradient_checkpointing", None),
            "_can_checkpoint_with_cache" in vars(module),
            sorted(vars(module)),
        )
    return found


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        model.train()
        self.before.append(flags(model))

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.after.append(flags(model))


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "qwen3_5_moe_text"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_leaves_modes_flags_and_hooks(name: str, checkpointing: bool, tmp_path: Path) -> None:
    watch = _Watch()
    arguments = config(tmp_path, gradient_checkpointing=checkpointing, verify_context="always")
    train(FrozenContextTrainer, adapted(name), arguments, as_dataset(ROWS), callbacks=[watch])
    assert len(watch.before) == 3
    assert watch.before == watch.after
    assert watch.before[0] == watch.after[-1]
    assert all(value[0] for value in watch.after[-1].values())
    assert not any(value[5] for value in watch.before[0].values())
    layers = [value[4] for value in watch.after[-1].values() if value[4] is not None]
    assert set(layers) == {checkpointing}
    assert not GradientCheckpointingLayer._can_checkpoint_with_cache


def test_an_error_in_a_step_leaves_no_flag_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")

    watch = _Watch()
    trainer = FrozenContextTrainer(
        model,
        config(tmp_path, verify_context="never"),
        train_dataset=as_dataset(ROWS),
        processing_class=word_tokenizer(),
        callbacks=[watch],
    )
    monkeypatch.setattr(model.get_base_model().model.layers[2].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert watch.after == []
    assert flags(model) == watch.before[0]


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_dropout_acts_on_decisions_only(name: str, tmp_path: Path) -> None:
    """With a dropout of 1 on the adapters they are off for the decision, while the context is encoded with them."""
    model = adapted(name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(1.0)
    arguments = config(tmp_path, max_steps=1, prefill_chunk_size=16)
    run = train(FrozenContextTrainer, copy.deepcopy(model), arguments, as_dataset(ROWS))
    assert all(not gradient.any() for gradient in run.gradients[0].values())
    rows = ROWS[:2]
    expected = torch.stack([nll_without_adapters_in_the_decision(model.eval(), row) for row in rows]).sum()
    assert run.losses == pytest.approx([expected.item() / num_labels(rows)], abs=1e-5)
    with torch.no_grad(), model.disable_adapter():
        nowhere = -sum(float(reference_logprobs(model, row.input_ids, row.boundary).sum()) for row in rows)
    assert abs(run.losses[0] - nowhere / num_labels(rows)) > 1e-3


@torch.no_grad()
def nll_without_adapters_in_the_decision(model: nn.Module, row: Sample) -> torch.Tensor:
    """Sum over labels, by a plain forward in which LoRA acts at context positions only."""

    def hook(module: LoraLayer, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, : row.boundary], module.base_layer(*arguments)[:, row.boundary :]], dim=1)

    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, LoraLayer)]
    logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return -token_logprobs(logits[row.boundary :], row.input_ids[row.boundary :]).sum()


def test_prefill_draws_no_random_numbers(tmp_path: Path) -> None:
    """Dropout in the decision is the same whatever length of context came before it."""
    model = fresh_lora(tiny_model("llama"), lora_dropout=0.3)
    whole = train_in_float64(FrozenContextTrainer, model, config(tmp_path), as_dataset(ROWS))
    arguments = config(tmp_path, prefill_chunk_size=5)
    chunked = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(ROWS))
    assert chunked.losses == pytest.approx(whole.losses, abs=1e-5)
    assert_trained_as(chunked, model, whole.weights)
    without = reference_gradients(model, ROWS[:2])
    key = next(name for name in without if "lora_B" in name)
    assert not torch.allclose(whole.gradients[0][key].float(), without[key], rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "granitemoehybrid"])
def test_a_trained_model_generates_and_loads_like_any_other(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    trained = train(FrozenContextTrainer, base, config(tmp_path / "run", max_steps=1), as_dataset(ROWS)).trainer
    trained.save_model(tmp_path / "saved")
    loaded = type(base).from_pretrained(tmp_path / "saved", dtype="float32")
    prompt = ROWS[0].input_ids[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(trained.model.eval().generate(prompt, **options), loaded.generate(prompt, **options))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "frozen_peft" not in json.dumps(saved)
    assert not torch.equal(loaded.lm_head.weight, tiny_model(name).lm_head.weight)
