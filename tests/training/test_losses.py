# SPDX-License-Identifier: Apache-2.0
"""TRL's other losses over frozen contexts: DFT, label smoothing, the user's own, and the router's auxiliary loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer
from tests.reference import num_labels, worst_gradient_error
from tests.training.runs import (
    IGNORED,
    Run,
    adapted,
    as_dataset,
    config,
    decision_logprobs,
    gradients_of,
    samples,
    stopped_forward,
    train,
)

TOLERANCE = 1e-5
ROWS = samples()[:2]
ACCUMULATED_ROWS = samples()[:4]

# TRL 1.16 announces that both go in its 2.0.
deprecated_in_trl = pytest.mark.filterwarnings("ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated")


def one_step(
    model: nn.Module, folder: Path, rows: list = ROWS, *, kind: type = FrozenContextTrainer, **fields: Any
) -> Run:
    kwargs = {"compute_loss_func": fields.pop("compute_loss_func")} if "compute_loss_func" in fields else {}
    arguments = config(folder, **({} if kind is FrozenContextTrainer else {"kind": SFTConfig}), max_steps=1, **fields)
    return train(kind, copy.deepcopy(model), arguments, as_dataset(rows), **kwargs)


def assert_step(run: Run, model: nn.Module, loss: torch.Tensor) -> None:
    assert run.losses == pytest.approx([loss.item()], abs=TOLERANCE)
    assert worst_gradient_error(run.gradients[0], gradients_of(loss, model)) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_dft(name: str, tmp_path: Path) -> None:
    """`-p.detach() * log p`, mean over the labels (arXiv 2508.05629)."""
    model = adapted(name)
    run = one_step(model, tmp_path, ACCUMULATED_ROWS, loss_type="dft", gradient_accumulation_steps=2)
    loss = torch.zeros(())
    for row in ACCUMULATED_ROWS:
        logprobs, labels = decision_logprobs(stopped_forward(model, row).logits[0], row)
        chosen = logprobs.gather(-1, labels[:, None])
        loss = loss - (chosen.exp().detach() * chosen).sum()
    assert_step(run, model, loss / num_labels(ACCUMULATED_ROWS))


@deprecated_in_trl
def test_label_smoothing(tmp_path: Path) -> None:
    model, smoothing = adapted(), 0.2
    run = one_step(model, tmp_path, label_smoothing_factor=smoothing)
    loss = torch.zeros(())
    for row in ROWS:
        logprobs, labels = decision_logprobs(stopped_forward(model, row).logits[0], row)
        chosen = logprobs.gather(-1, labels[:, None])
        loss = loss - (1 - smoothing) * chosen.sum() - smoothing * logprobs.mean(-1).sum()
    assert_step(run, model, loss / num_labels(ROWS))


@deprecated_in_trl
def test_a_loss_function_of_the_user_gets_logits_and_labels_of_the_decisions(tmp_path: Path) -> None:
    model = adapted()
    shapes = []

    def margin_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        shapes.append((tuple(outputs.logits.shape[:2]), tuple(labels.shape)))
        predicted = labels[:, 1:] != IGNORED
        logits = outputs.logits[:, :-1][predicted]
        chosen = logits.gather(-1, labels[:, 1:][predicted][:, None]).squeeze(-1)
        return (logits.amax(-1) - chosen).sum() / num_items_in_batch

    run = one_step(model, tmp_path, compute_loss_func=margin_loss)
    widest = max(len(row.decision) for row in ROWS)
    assert shapes == [((2, widest), (2, widest))]
    loss = torch.zeros(())
    for row in ROWS:
        logprobs, labels = decision_logprobs(stopped_forward(model, row).logits[0], row)
        loss = loss + (logprobs.amax(-1) - logprobs.gather(-1, labels[:, None]).squeeze(-1)).sum()
    assert_step(run, model, loss / num_labels(ROWS))


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "qwen3_next", "granitemoehybrid", "gpt_oss"])
def test_the_auxiliary_loss_is_that_of_the_decisions(name: str, tmp_path: Path) -> None:
    coefficient = 0.5
    model = adapted(name)
    run = one_step(model, tmp_path, router_aux_loss_coef=coefficient)

    router_logits, loss = [], torch.zeros(())
    for row in ROWS:
        output = stopped_forward(model, row, output_router_logits=True)
        router_logits.append([layer[row.boundary :] for layer in output.router_logits])
        logprobs, labels = decision_logprobs(output.logits[0], row)
        loss = loss - logprobs.gather(-1, labels[:, None]).sum()
    layers = tuple(torch.cat(parts) for parts in zip(*router_logits, strict=True))
    text_config = model.config.get_text_config()
    auxiliary = load_balancing_loss_func(layers, layers[0].shape[-1], text_config.num_experts_per_tok)

    assert run.logs[0]["aux_loss"] == pytest.approx(auxiliary.item(), abs=TOLERANCE)
    assert_step(run, model, loss / num_labels(ROWS) + coefficient * auxiliary)


def test_the_auxiliary_loss_of_accumulated_batches_is_their_mean(tmp_path: Path) -> None:
    model = adapted("qwen3_5_moe_text")
    fields = {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2, "tier": 2}
    whole = [one_step(model, tmp_path, rows, router_aux_loss_coef=0.5) for rows in (samples()[:2], samples()[2:4])]
    both = one_step(model, tmp_path, ACCUMULATED_ROWS, **fields)
    mean = sum(run.logs[0]["aux_loss"] for run in whole) / 2
    assert both.logs[0]["aux_loss"] == pytest.approx(mean, abs=TOLERANCE)


def test_without_a_coefficient_there_is_no_auxiliary_loss(tmp_path: Path) -> None:
    model = adapted("qwen3_5_moe_text")
    ours = one_step(model, tmp_path, router_aux_loss_coef=0.0)
    theirs = one_step(model, tmp_path, kind=SFTTrainer, router_aux_loss_coef=0.0)
    assert "aux_loss" not in ours.logs[0]
    assert ours.losses == pytest.approx(theirs.losses, abs=TOLERANCE)


def test_experts_without_an_auxiliary_loss_train(tmp_path: Path) -> None:
    """GLM-4-MoE balances its experts by a bias and declares no coefficient."""
    model = adapted("glm4_moe")
    run = one_step(model, tmp_path)
    loss = torch.zeros(())
    for row in ROWS:
        logprobs, labels = decision_logprobs(stopped_forward(model, row).logits[0], row)
        loss = loss - logprobs.gather(-1, labels[:, None]).sum()
    assert "aux_loss" not in run.logs[0]
    assert_step(run, model, loss / num_labels(ROWS))


def test_a_dense_model_of_a_family_with_experts_trains(tmp_path: Path) -> None:
    """Granite's dense hybrids declare a coefficient, and have no router."""
    model = adapted("granitemoehybrid", num_local_experts=0)
    run = one_step(model, tmp_path)
    assert "aux_loss" not in run.logs[0]
    assert run.losses[0] > 0.0
