# SPDX-License-Identifier: Apache-2.0
"""The trainer gives the loss and the gradients of `recipes/minimal.py`, the method without abstractions."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from frozen_peft import FrozenContextConfig, FrozenContextTrainer
from recipes import minimal
from tests.tiny_models import tiny_model
from tests.training.runs import word_tokenizer

CONTEXT, DECISION = 150, 20


def trainer_on(samples: list[list[int]], folder: Path, *, checkpointing: bool) -> FrozenContextTrainer:
    model = tiny_model("qwen3_5_text")
    labels = [[-100] * (CONTEXT + 1) + sample[CONTEXT + 1 :] for sample in samples]
    args = FrozenContextConfig(
        str(folder),
        tier=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=checkpointing,
        prefill_chunk_size=64,
    )
    trainer = FrozenContextTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"input_ids": samples, "labels": labels}),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=minimal.RESPONSE_MODULES, init_lora_weights=False),
    )
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.model.train()
    return trainer


def adapter_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_matches_minimal(tmp_path: Path, checkpointing: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(2, 90, (2, CONTEXT + DECISION), generator=generator)
    trainer = trainer_on(samples.tolist(), tmp_path, checkpointing=checkpointing)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = adapter_gradients(trainer.model)

    base = trainer.model.get_base_model()
    base.set_attn_implementation("sdpa")
    minimal.allow_checkpointing(base)
    # Decisions of equal length, so the mean over the batch is the mean of the samples' means.
    expected = sum(
        minimal.decision_loss(base, minimal.encode_context(base, row[None, :CONTEXT]), row[None, CONTEXT:])
        for row in samples
    ) / len(samples)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected_gradients = adapter_gradients(trainer.model)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = expected_gradients[name].norm()
        assert scale > 0, name
        assert (gradient - expected_gradients[name]).norm() / scale < 1e-5, name


def test_minimal_learns(capsys: pytest.CaptureFixture[str]) -> None:
    minimal.main()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
