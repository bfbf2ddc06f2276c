# SPDX-License-Identifier: Apache-2.0
"""Turns behind what inference shows train as one sample per turn, rendered by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from frozen_peft import FrozenContextTrainer
from tests.reference import Sample, negative_log_likelihood, num_labels, reference_gradients, worst_gradient_error
from tests.tiny_models import ARCHITECTURES, LATENT_ATTENTION, LENGTH_DEPENDENT, add_lora, tiny_model
from tests.training.runs import Run, config, train
from tests.training.traces import TRACE_VOCABULARY, rendered_turns, template_tokenizer, trace

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5


def adapted(name: str = "qwen3_5_text") -> Any:
    return add_lora(tiny_model(name, vocab_size=TRACE_VOCABULARY))


def one_step(model: Any, folder: Path, rows: list[dict], template: str = "qwen3", **fields: Any) -> Run:
    """One step over all rows, whose turns stand behind what inference shows."""
    defaults = {"max_steps": 1, "per_device_train_batch_size": len(rows), "router_aux_loss_coef": 0.0}
    arguments = config(folder, decision_mode="turns", turn_contexts="inference", **(defaults | fields))
    tokenizer = template_tokenizer(template)
    return train(FrozenContextTrainer, model, arguments, Dataset.from_list(rows), processing_class=tokenizer)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, turns: list[Sample]) -> float:
    losses = [negative_log_likelihood(model(input_ids=s.input_ids[None]).logits[0], s.labels) for s in turns]
    return float(sum(losses) / num_labels(turns))


def assert_trained_per_turn(run: Run, model: Any, turns: list[Sample]) -> None:
    assert worst_gradient_error(run.gradients[0], reference_gradients(model, turns)) <= GRADIENT_TOLERANCE
    assert run.losses[0] == pytest.approx(mean_loss(model, turns), rel=LOSS_TOLERANCE)


# One of each kind of layer.
ONE_OF_A_KIND = ("llama", "qwen3_5_text", "kimi_linear", "falcon_h1", "lfm2", "gemma3_text", "gpt_oss")
# phimoe draws its experts at random in training.
ALL = tuple(name for name in (*ARCHITECTURES, *LATENT_ATTENTION, *LENGTH_DEPENDENT) if name != "phimoe")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.long) for name in ALL]
)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    rows = [trace(), trace(tools=False)]
    # llama4 counts positions from the longest row.
    run = one_step(adapted(name), tmp_path, rows, max_decisions_per_forward=1 if name == "llama4_text" else 3)
    turns = [turn for row in rows for turn in rendered_turns(template_tokenizer("qwen3"), row)]
    assert len(turns) == 8
    assert_trained_per_turn(run, adapted(name), turns)
