# SPDX-License-Identifier: Apache-2.0
"""16-bit autocast and a 4-bit base."""

import math
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer, lora_config, quantization_config
from tests.reference import reference_gradients
from tests.tiny_models import tiny_model
from tests.training.runs import adapted, as_dataset, config, samples, train, word_tokenizer

ROWS = samples()


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama", True), ("qwen3_5_text", True), ("granitemoehybrid", True), ("qwen3_5_text", False)],
)
def test_under_autocast_every_adapter_gets_its_gradient(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """autocast keeps the weights it casts; casts made in the prefill, without gradient, would serve the decision."""
    model = adapted(name)
    fields = {"bf16": True, "max_steps": 1, "gradient_checkpointing": checkpointing, "router_aux_loss_coef": 0.0}
    expected = reference_gradients(model, ROWS[:2])
    run = train(FrozenContextTrainer, model, config(tmp_path, **fields), as_dataset(ROWS))
    assert run.gradients[0].keys() == expected.keys()
    for key, gradient in run.gradients[0].items():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all(), key
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[key].flatten(), dim=0)
        assert cosine > 0.99, (key, float(cosine))


def test_a_model_in_bfloat16_trains(tmp_path: Path) -> None:
    model = adapted()
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    run = train(FrozenContextTrainer, model, config(tmp_path, bf16=True), as_dataset(ROWS))
    assert all(math.isfinite(loss) for loss in run.losses)
    assert all(gradient.abs().max() > 0 for gradient in run.gradients[-1].values())


def bytes_of_4bit(model: nn.Module) -> dict[str, bytes]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            for part, tensor in (("", module.weight), (".absmax", state.absmax), (".nested", state.state2.absmax)):
                found[name + part] = tensor.detach().clone().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_a_4bit_base_trains_and_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    """Dimensions are multiples of 64, for which bitsandbytes would repack the weights in a forward in eval mode."""
    checkpoint = tmp_path / "checkpoint"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
    tiny_model(name, **sizes).save_pretrained(checkpoint)
    word_tokenizer().save_pretrained(checkpoint)

    def trainer(kind: type[SFTTrainer], arguments: SFTConfig) -> SFTTrainer:
        return kind(
            str(checkpoint),
            arguments,
            train_dataset=as_dataset(ROWS),
            eval_dataset=as_dataset(ROWS[:4]),
            quantization_config=quantization_config(str(checkpoint)),
            peft_config=lora_config(str(checkpoint), r=2),
        )

    ours = trainer(FrozenContextTrainer, config(tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True))
    before = bytes_of_4bit(ours.model)
    assert before
    trainable = {key: weight.detach().clone() for key, weight in ours.model.named_parameters() if weight.requires_grad}
    ours.train()
    assert bytes_of_4bit(ours.model) == before
    for key, weight in ours.model.named_parameters():
        if "lora_B" in key:
            assert not torch.equal(weight, trainable[key]), key

    theirs = trainer(SFTTrainer, config(tmp_path, SFTConfig, max_steps=1))
    theirs.train()
    losses = [[e["loss"] for e in each.state.log_history if "loss" in e] for each in (ours, theirs)]
    assert len(losses[0]) == 3
    assert losses[0][0] == pytest.approx(losses[1][0], abs=2e-2)
    evaluations = [entry["eval_loss"] for entry in ours.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert all(math.isfinite(loss) for loss in evaluations)
