# SPDX-License-Identifier: Apache-2.0
"""Answers that are wanted or not, over frozen contexts: KTO's loss and gradients are those of plain forwards."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trl import KTOConfig, KTOTrainer

from frozen_peft import FrozenContextKTOConfig, FrozenContextKTOTrainer
from tests.reference import worst_gradient_error
from tests.tiny_models import ROPE_LIMIT, tiny_model
from tests.training.preferences import BETA, Pair, acting_lora, log_ratio, settings, untouched, without_adapters
from tests.training.runs import Run, equal, gradients_of, in_float64, train, without_timings, words

TOLERANCE, LOGGED, SINGLE = 1e-9, 3e-7, 1e-5
SHAPES = ((40, 6), (65, 2), (23, 12), (129, 4))


def rows_of(shapes: tuple[tuple[int, int], ...] = SHAPES) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": words(prompt, seed=row) + " ",
                "completion": words(length, seed=9 + row) + " ",
                "label": row % 2 == 0,
            }
            for row, (prompt, length) in enumerate(shapes)
        ]
    )


def train_answers(args: Any, rows: Dataset, name: str = "llama", **kwargs: Any) -> Run:
    trainer = FrozenContextKTOTrainer if isinstance(args, FrozenContextKTOConfig) else KTOTrainer
    model = tiny_model(name)
    with in_float64(model) as exact:
        return train(trainer, exact, args, rows, **{"peft_config": acting_lora(model), **kwargs})


def kto_loss(model: nn.Module, reference: nn.Module, rows: list[dict[str, Any]], loss_type: str) -> torch.Tensor:
    """KTO's loss as its paper has it, the divergence estimated from answers to other prompts."""

    def ratio(row: dict[str, Any], answer: str) -> torch.Tensor:
        prompt, ids = (torch.tensor(row[name]) for name in ("prompt_ids", answer))
        return log_ratio(model, reference, Pair(prompt, ids, ids), ids)

    with torch.no_grad():
        mismatched = torch.stack([ratio(row, "KL_completion_ids") for row in rows]) if loss_type == "kto" else None
    divergence = mismatched.mean().clamp(min=0) if mismatched is not None else 0.0
    losses = []
    for row in rows:
        margin = ratio(row, "completion_ids") - divergence
        losses.append(1 - torch.sigmoid(BETA * (margin if row["label"] else -margin)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss_type": "apo_zero_unpaired"},
        {"precompute_ref_log_probs": True},
        {"context_cache_size": "1GiB"},
        {"gradient_checkpointing": False, "prefill_chunk_size": 9},
        {"sequence_chunk_size": 4},
        {"ref_model": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text"])
def test_it_trains_as_direct_autograd_says(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    fields = dict(fields)
    given = {"ref_model": tiny_model(name).double()} if fields.pop("ref_model", False) else {}
    args = settings(tmp_path, FrozenContextKTOConfig, learning_rate=0.0, max_steps=4, **fields)
    run = train_answers(args, rows_of(), name, **given)
    rows = list(run.trainer.train_dataset)
    is_kept = "precompute_ref_log_probs" in fields
    for step, batch in enumerate([rows[:2], rows[2:]] * 2):
        with in_float64(untouched(run.trainer.model)) as exact:
            loss = kto_loss(exact, without_adapters(exact), batch, args.loss_type)
            expected = gradients_of(loss, exact)
        assert run.losses[step] == pytest.approx(loss.item(), rel=SINGLE if is_kept else LOGGED)
        assert worst_gradient_error(run.gradients[step], expected) <= (SINGLE if is_kept else TOLERANCE)


def test_the_mismatched_answer_stands_behind_the_same_context(tmp_path: Path) -> None:
    args = settings(tmp_path, FrozenContextKTOConfig, max_steps=4, context_cache_size="1GiB")
    run = train_answers(args, rows_of())
    counts = run.trainer._frozen.encoder.counts
    contexts = sum(prompt - 1 for prompt, _ in SHAPES)
    assert (counts.num_tokens_asked, counts.num_tokens_encoded) == (2 * 2 * contexts, 2 * contexts)
    assert run.trainer._reference_contexts.encoder.counts.num_tokens_encoded == contexts


@pytest.mark.parametrize(
    "fields",
    [{}, {"gradient_horizon": 4096}, {"gradient_horizon": 4096, "precompute_ref_log_probs": True}],
    ids=str,
)
def test_where_positions_hang_on_length_each_answer_has_its_own(fields: dict[str, Any], tmp_path: Path) -> None:
    """The answer ends before the limit and the mismatched one beyond it, or the other way round."""
    shapes = ((ROPE_LIMIT - 8, 3), (ROPE_LIMIT - 9, 21))
    args = settings(tmp_path, FrozenContextKTOConfig, learning_rate=0.0, **fields)
    run = train_answers(args, rows_of(shapes), "phi3", peft_config=None, ref_model=tiny_model("phi3", seed=1).double())
    with in_float64(untouched(run.trainer.model)) as exact:
        loss = kto_loss(exact, tiny_model("phi3", seed=1).double(), list(run.trainer.train_dataset), "kto")
    assert run.losses[0] == pytest.approx(loss.item(), rel=LOGGED)


@pytest.mark.parametrize(
    "fields", [{}, {"loss_type": "apo_zero_unpaired"}, {"precompute_ref_log_probs": True}], ids=str
)
def test_tier_1_is_kto_trainer_bit_for_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"max_steps": 10, "desirable_weight": 1.1, **fields}
    ours = train_answers(settings(tmp_path / "ours", FrozenContextKTOConfig, tier=1, **fields), rows_of())
    theirs = train_answers(settings(tmp_path / "theirs", KTOConfig, **fields), rows_of())
    assert without_timings(ours.logs) == without_timings(theirs.logs)
    assert equal(ours.weights, theirs.weights)


def test_rows_are_not_ordered_where_neighbours_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compares each with its neighbours"):
        settings(tmp_path, FrozenContextKTOConfig, group_by_context=True)
    fields = {"group_by_context": True, "train_sampling_strategy": "random", "loss_type": "apo_zero_unpaired"}
    args = settings(tmp_path, FrozenContextKTOConfig, **fields)
    assert train_answers(args, rows_of()).losses


def test_a_divergence_of_one_row_is_refused_as_by_trl(tmp_path: Path) -> None:
    args = settings(tmp_path, FrozenContextKTOConfig, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="batch size must be > 1"):
        train_answers(copy.copy(args), rows_of())


@pytest.mark.parametrize("lacking", ["KL_completion_ids", "label"])
def test_tokenized_rows_that_lack_something(lacking: str, tmp_path: Path) -> None:
    row = {"prompt_ids": [9, 10], "completion_ids": [11, 12], "KL_completion_ids": [13], "label": True}
    rows = Dataset.from_list([{name: value for name, value in row.items() if name != lacking}] * 4)
    with pytest.raises(ValueError, match=f"count as tokenized, and lacks `{lacking}`"):
        train_answers(settings(tmp_path, FrozenContextKTOConfig), rows)
    if lacking != "label":
        args = settings(tmp_path, FrozenContextKTOConfig, loss_type="apo_zero_unpaired")
        assert train_answers(args, rows).losses
