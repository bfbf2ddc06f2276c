# SPDX-License-Identifier: Apache-2.0
"""With a frozen context the trainer gives the losses and weights of plain forwards with a stop-gradient."""

import copy
from pathlib import Path

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer
from tests.reference import Sample, num_labels, reference_logprobs
from tests.tiny_models import tiny_model
from tests.training.runs import (
    RAGGED,
    adapted,
    as_dataset,
    assert_trained_as,
    batches,
    config,
    equal,
    reference_sgd,
    samples,
    train,
    train_in_float64,
    trained_weights,
    word_tokenizer,
    worst_update_error,
)

LOSS_TOLERANCE = 1e-5
# Of an update, where the gradient is another one.
LOST = 1e-3

ROWS = samples()


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, True) for name in ("llama", "qwen3_5_text", "qwen3_5", "mistral", "granitemoehybrid")),
        *((name, False) for name in ("llama", "qwen3_5_text")),
    ],
)
def test_weights_are_those_of_plain_forwards_with_a_stop_gradient(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    model = adapted(name)
    arguments = config(tmp_path, tier=2, gradient_checkpointing=checkpointing, router_aux_loss_coef=0.0)
    run = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(ROWS))
    assert_trained_as(run, model, reference_sgd(model, batches(ROWS, 2, 3)))


@pytest.mark.parametrize(
    "fields",
    [
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 0},
        {"checkpoint_every": 3},
        {"pad_to_multiple_of": 8},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_fields_that_only_save_memory_change_no_gradient(fields: dict, tmp_path: Path) -> None:
    model = adapted()
    run = train_in_float64(FrozenContextTrainer, model, config(tmp_path, **fields), as_dataset(ROWS))
    assert_trained_as(run, model, reference_sgd(model, batches(ROWS, 2, 3)))


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    model = adapted()
    arguments = config(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    run = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(ROWS))
    assert_trained_as(run, model, reference_sgd(model, batches(ROWS, 4, 3)))


def test_the_first_loss_is_that_of_sft_trainer(tmp_path: Path) -> None:
    model = adapted()
    fields = {"gradient_accumulation_steps": 2, "max_steps": 1}
    ours = train(FrozenContextTrainer, copy.deepcopy(model), config(tmp_path, **fields), as_dataset(ROWS))
    theirs = train(SFTTrainer, copy.deepcopy(model), config(tmp_path, SFTConfig, **fields), as_dataset(ROWS))
    assert ours.losses == pytest.approx(theirs.losses, abs=LOSS_TOLERANCE)
    rows = ROWS[:4]
    plain = -sum(float(reference_logprobs(model, row.input_ids, row.boundary).sum()) for row in rows)
    assert ours.losses == pytest.approx([plain / num_labels(rows)], abs=LOSS_TOLERANCE)


def test_metrics_are_those_of_sft_trainer(tmp_path: Path) -> None:
    """At a learning rate of zero both trainers see the same model at every step."""
    fields = {"learning_rate": 0.0, "max_steps": 4}
    ours = train(FrozenContextTrainer, adapted(), config(tmp_path, **fields), as_dataset(ROWS))
    theirs = train(SFTTrainer, adapted(), config(tmp_path, SFTConfig, **fields), as_dataset(ROWS))
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        for key in ("num_tokens", "epoch", "step", "learning_rate"):
            assert mine[key] == other[key]
        for key in ("loss", "entropy", "mean_token_accuracy"):
            assert mine[key] == pytest.approx(other[key], abs=LOSS_TOLERANCE)
    assert theirs.logs[-1]["num_tokens"] == sum(map(sum, RAGGED))


@pytest.mark.parametrize("horizon", [1, 20])
def test_a_gradient_horizon_lets_gradient_into_the_last_context_tokens(horizon: int, tmp_path: Path) -> None:
    model = adapted("llama")
    arguments = config(tmp_path, gradient_horizon=horizon)
    run = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(ROWS))
    rows = [WithHorizon(row.input_ids, row.labels, horizon) for row in ROWS]
    assert_trained_as(run, model, reference_sgd(model, batches(rows, 2, 3)))
    nothing = train_in_float64(FrozenContextTrainer, model, config(tmp_path), as_dataset(ROWS))
    assert worst_update_error(nothing.weights, run.weights, trained_weights(model)) > LOST


class WithHorizon(Sample):
    """A sample whose gradient stops `horizon` tokens before its decision."""

    def __init__(self, input_ids: torch.Tensor, labels: torch.Tensor, horizon: int):
        super().__init__(input_ids, labels)
        object.__setattr__(self, "horizon", horizon)

    @property
    def boundary(self) -> int:
        return max(super().boundary - self.horizon, 0)


@pytest.mark.parametrize("horizon", [0, -1])
def test_the_oldest_context_is_dropped_beyond_max_context_length(horizon: int, tmp_path: Path) -> None:
    kept = 19
    rows = [
        Sample(row.input_ids[max(row.boundary - kept, 0) :], row.labels[max(row.boundary - kept, 0) :]) for row in ROWS
    ]
    fields = {"gradient_horizon": horizon}
    model = adapted("llama")
    arguments = config(tmp_path, max_context_length=kept, **fields)
    cut = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(ROWS))
    short = train_in_float64(FrozenContextTrainer, model, config(tmp_path, **fields), as_dataset(rows))
    assert cut.losses == pytest.approx(short.losses, abs=LOSS_TOLERANCE)
    assert_trained_as(cut, model, short.weights)


def test_a_sample_over_max_length_loses_its_oldest_context(tmp_path: Path) -> None:
    longest = 30
    rows = [Sample(row.input_ids[-longest:], row.labels[-longest:]) for row in ROWS]
    assert all((row.labels != -100).sum() == (full.labels != -100).sum() for row, full in zip(rows, ROWS, strict=True))
    cut = train(FrozenContextTrainer, adapted("llama"), config(tmp_path, max_length=longest), as_dataset(ROWS))
    short = train(FrozenContextTrainer, adapted("llama"), config(tmp_path), as_dataset(rows))
    assert cut.losses == short.losses
    assert equal(cut.weights, short.weights)


def test_batches_of_contexts_of_none_and_of_both(tmp_path: Path) -> None:
    """Batches in which every sample, one sample and no sample has a context."""
    rows = samples([(30, 7), (12, 9), (0, 11), (23, 5), (0, 13), (0, 6)])
    model = adapted()
    run = train_in_float64(FrozenContextTrainer, model, config(tmp_path), as_dataset(rows))
    assert_trained_as(run, model, reference_sgd(model, batches(rows, 2, 3)))


def test_decisions_of_one_supervised_token(tmp_path: Path) -> None:
    rows = samples([(31, 2), (65, 2), (64, 2), (63, 2)])
    model = adapted()
    arguments = config(tmp_path, max_steps=2)
    run = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(rows))
    assert_trained_as(run, model, reference_sgd(model, batches(rows, 2, 2)))


@pytest.mark.parametrize("selective", [False, True])
def test_a_model_without_peft(selective: bool, tmp_path: Path) -> None:
    """TRL's selective checkpoints (1.16) know no PEFT model."""
    model = tiny_model("llama")
    arguments = config(tmp_path, gradient_checkpointing_kwargs={"selective": selective})
    run = train_in_float64(FrozenContextTrainer, model, arguments, as_dataset(ROWS))
    assert run.weights.keys() == dict(model.named_parameters()).keys()
    assert_trained_as(run, model, reference_sgd(model, batches(ROWS, 2, 3)))


def test_resuming_from_a_checkpoint_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    model = adapted()
    fields = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    saving = config(tmp_path, save_strategy="steps", save_steps=2, **fields)
    whole = train(FrozenContextTrainer, copy.deepcopy(model), saving, as_dataset(ROWS))
    resumed = train(
        FrozenContextTrainer,
        copy.deepcopy(model),
        config(tmp_path, **fields),
        as_dataset(ROWS),
        resume=str(tmp_path / "checkpoint-2"),
    )
    assert resumed.losses == whole.losses
    assert equal(resumed.weights, whole.weights)


def test_the_processing_class_may_be_given_by_position(tmp_path: Path) -> None:
    trainer = FrozenContextTrainer(
        adapted("llama"), config(tmp_path), None, as_dataset(ROWS), as_dataset(ROWS), word_tokenizer()
    )
    assert isinstance(trainer.processing_class, type(word_tokenizer()))
