# SPDX-License-Identifier: Apache-2.0
"""Running out of memory in a training: prefill goes on, a decision ends with what to change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from frozen_peft import FrozenContextTrainer
from frozen_peft.context.halving import AdvisedOutOfMemoryError
from frozen_peft.training.memory_advice import memory_advice
from tests.training.runs import adapted, as_dataset, config, samples, train

ROWS = samples([(140, 7), (90, 5)])


def _fail(model: nn.Module, *, graded: bool, more_than: int) -> list[Any]:
    """Makes the first MLP run out of memory in forwards with, or without, gradient."""
    module = next(module for name, module in model.named_modules() if name.endswith("mlp"))

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled() is graded and output.shape[:-1].numel() > more_than:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return [module.register_forward_hook(hook)]


def test_prefill_goes_on_in_smaller_chunks(tmp_path: Path) -> None:
    fields = {"max_steps": 1, "verify_context": "never"}
    expected = train(FrozenContextTrainer, adapted(), config(tmp_path / "whole", **fields), as_dataset(ROWS))
    model = adapted()
    _fail(model, graded=False, more_than=64)
    run = train(FrozenContextTrainer, model, config(tmp_path / "small", **fields), as_dataset(ROWS))
    assert run.trainer._frozen.encoder.chunk_size == 64
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, gradient in expected.gradients[0].items():
        assert (run.gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("tier", [2, 3])
def test_a_decision_ends_with_what_to_change(tier: int, tmp_path: Path) -> None:
    model = adapted()
    _fail(model, graded=True, more_than=0)
    fields = {"max_steps": 1, "verify_context": "never", "gradient_checkpointing": False, "tier": tier}
    with pytest.raises(AdvisedOutOfMemoryError, match=r"^CUDA out of memory") as caught:
        train(FrozenContextTrainer, model, config(tmp_path, **fields), as_dataset(ROWS))
    text = str(caught.value)
    assert "A step of training does not fit" in text
    assert "- `per_device_train_batch_size: 1` instead of 2" in text
    assert "- `gradient_checkpointing: true`" in text
    assert ("`max_context_length`" in text) is (tier == 2)
    # `auto_find_batch_size` still sees what it is.
    assert should_reduce_batch_size(caught.value)


def test_advice_names_what_is_set(tmp_path: Path) -> None:
    def advice(evaluation: bool = False, **fields: Any) -> str:
        return "\n".join(memory_advice(config(tmp_path, **fields), evaluation=evaluation))

    assert "max_decisions_per_forward: 4" in advice(decision_mode="turns", max_decisions_per_forward=8)
    assert "checkpoint_every: 1` instead of 4" in advice(checkpoint_every=4)
    assert "`gradient_horizon` below 64" in advice(gradient_horizon=64)
    assert "`sequence_chunk_size: 1024`" in advice(tier=3)
    stretched = advice(tier=3, sequence_chunk_size=512)
    assert "`sequence_chunk_size` below 512" in stretched
    assert "`offload_stretches: true`" in stretched
    assert "offload" not in advice(tier=3, sequence_chunk_size=512, offload_stretches=True)
    evaluation = advice(evaluation=True)
    assert "`per_device_eval_batch_size: 1`" in evaluation
    assert "checkpoint" not in evaluation
    assert "batch_size" not in advice(per_device_train_batch_size=1)
