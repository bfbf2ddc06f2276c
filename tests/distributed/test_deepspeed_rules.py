# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's engine needs of a step, without DeepSpeed; with it, see `test_deepspeed`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from frozen_peft import FrozenContextTrainer
from tests.reference import Sample, negative_log_likelihood, num_labels, reference_gradients, worst_gradient_error
from tests.training.runs import adapted, as_dataset, batches, config, gradients_of, samples, word_tokenizer
from tests.training.test_turns import ROWS, per_span


class Engine:
    """What accelerate's wrapper of an engine calls, of DeepSpeed's signatures; a step takes the gradients away."""

    def __init__(self) -> None:
        self.model: torch.nn.Module | None = None
        self.boundaries: list[bool] = []
        self.steps: list[dict[str, torch.Tensor]] = []

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        loss.backward()

    def step(self) -> None:
        assert self.model is not None
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.steps.append({name: weight.grad.clone() for name, weight in weights.items()})
        self.model.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_engine_steps_once_in_a_step(accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    wrapper = DeepSpeedEngineWrapper(engine)

    def backward(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        wrapper.backward(loss, sync_gradients=self.sync_gradients, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", backward)
    engine.model = adapted("llama")
    fields = {"decision_mode": "turns", "max_decisions_per_forward": 1, "gradient_accumulation_steps": accumulation}
    arguments = config(tmp_path, per_device_train_batch_size=1, max_steps=2, **fields)
    trainer = FrozenContextTrainer(
        engine.model, arguments, train_dataset=as_dataset(ROWS), processing_class=word_tokenizer()
    )
    trainer.train()
    steps = [per_span(batch) for batch in batches(ROWS, accumulation, 2)]
    assert len(engine.steps) == len(steps) == trainer.state.global_step
    assert len(engine.boundaries) == sum(map(len, steps)) > sum(engine.boundaries) == len(steps)
    # The engine leaves the weights as they are, so every step is of the same.
    for gradients, spans in zip(engine.steps, steps, strict=True):
        assert num_labels(spans) > 0
        assert worst_gradient_error(gradients, reference_gradients(adapted("llama"), spans)) <= 1e-5


@pytest.mark.parametrize("is_deepspeed", [True, False])
def test_gradients_come_in_one_order_whatever_the_length(
    is_deepspeed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed reduces them as they come: where another process has another order, one weight with another."""
    rows = samples(((0, 11), (40, 9), (9, 11)))
    trainer = FrozenContextTrainer(
        adapted("llama"),
        config(tmp_path, tier=3, sequence_chunk_size=20),
        train_dataset=as_dataset(rows),
        processing_class=word_tokenizer(),
    )
    if is_deepspeed:
        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    order: list[str] = []
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for name, weight in weights.items():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    orders, gradients = [], []
    for row in trainer.train_dataset:
        trainer.compute_loss(trainer.model, trainer.data_collator([row])).backward()
        orders.append(tuple(order))
        gradients.append({name: weight.grad.clone() for name, weight in weights.items()})
        order.clear()
        trainer.model.zero_grad()
    assert len(set(orders)) == (1 if is_deepspeed else 2)
    for row, found in zip(rows, gradients, strict=True):
        assert worst_gradient_error(found, full_gradients(adapted("llama"), row)) <= 1e-5


def full_gradients(model: torch.nn.Module, row: Sample) -> dict[str, torch.Tensor]:
    """Of one plain forward over a sample."""
    logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
    return gradients_of(negative_log_likelihood(logits, row.labels) / num_labels([row]), model)
