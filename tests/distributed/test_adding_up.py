# SPDX-License-Identifier: Apache-2.0
"""An engine that steps in `backward` steps once for all parts of a step; DeepSpeed itself is in `test_deepspeed`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

from frozen_peft import FrozenContextTrainer
from tests.reference import num_labels, reference_gradients, worst_gradient_error
from tests.trainer.runs import adapted, as_dataset, batches, config, word_tokenizer
from tests.trainer.test_turns import ROWS, per_span


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
