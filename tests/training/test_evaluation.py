# SPDX-License-Identifier: Apache-2.0
"""Evaluation over frozen contexts: the figures of `SFTTrainer`, and logits that belong to their labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer
from tests.training.runs import IGNORED, adapted, as_dataset, config, samples, train, word_tokenizer, words

TOLERANCE = 1e-5
ROWS = samples()

# TRL 1.16 announces that metrics from logits go in its 2.0.
deprecated_in_trl = pytest.mark.filterwarnings("ignore:`return_outputs=True`")


def both(model_name: str, folder: Path, **kwargs: Any) -> list[SFTTrainer]:
    """The trainer under test and `SFTTrainer`, on the same model and data."""
    fields = kwargs.pop("fields", {})
    return [
        kind(
            adapted(model_name),
            arguments,
            train_dataset=as_dataset(ROWS),
            processing_class=word_tokenizer(),
            **kwargs,
        )
        for kind, arguments in (
            (FrozenContextTrainer, config(folder, tier=2, **fields)),
            (SFTTrainer, config(folder, SFTConfig, **fields)),
        )
    ]


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {
        key: pytest.approx(value, abs=TOLERANCE)
        for key, value in metrics.items()
        if not key.endswith(("runtime", "per_second", "preparation_time"))
    }


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "qwen3_5_moe_text"])
def test_the_figures_are_those_of_sft_trainer(name: str, tmp_path: Path) -> None:
    # The auxiliary loss of experts is that of the decisions, unlike SFTTrainer's.
    trainers = both(name, tmp_path, eval_dataset=as_dataset(ROWS[:5]), fields={"router_aux_loss_coef": 0.0})
    ours, theirs = (trainer.evaluate() for trainer in trainers)
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"} <= theirs.keys()
    assert {key: ours[key] for key in figures(theirs)} == figures(theirs)


def test_datasets_by_name(tmp_path: Path) -> None:
    datasets = {"short": as_dataset(ROWS[1:3]), "long": as_dataset(ROWS[4:])}
    ours, theirs = (trainer.evaluate() for trainer in both("llama", tmp_path, eval_dataset=datasets))
    assert {"eval_short_loss", "eval_long_loss"} <= theirs.keys()
    assert {key: ours[key] for key in figures(theirs)} == figures(theirs)


def test_a_new_dataset_is_prepared_and_checked(tmp_path: Path) -> None:
    new = Dataset.from_list(
        [{"prompt": words(20 + 7 * i, seed=i), "completion": " " + words(5, seed=i)} for i in range(3)]
    )
    empty = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[IGNORED] * 3]})
    # Whether a loss is on completions only is decided by the training dataset.
    ours, theirs = both("qwen3_5_text", tmp_path, fields={"completion_only_loss": True})
    expected = figures(theirs.evaluate(new))
    found = ours.evaluate(new)
    assert {key: found[key] for key in expected} == expected
    with pytest.raises(ValueError, match=r"Sample 0 of the eval dataset has no supervised label"):
        ours.evaluate(empty)


def test_evaluation_between_steps_leaves_training_as_it_is(tmp_path: Path) -> None:
    plain = train(FrozenContextTrainer, adapted(), config(tmp_path), as_dataset(ROWS))
    fields = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    evaluated = train(
        FrozenContextTrainer, adapted(), config(tmp_path, **fields), as_dataset(ROWS), eval_dataset=as_dataset(ROWS)
    )
    assert evaluated.losses == plain.losses
    assert [entry["num_tokens"] for entry in evaluated.logs] == [entry["num_tokens"] for entry in plain.logs]


@deprecated_in_trl
@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "qwen3_5"])
def test_logits_and_labels_for_metrics_are_those_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"seen": float(len(seen))}

    model = adapted(name)
    trainer = FrozenContextTrainer(
        model,
        config(tmp_path),
        train_dataset=as_dataset(ROWS),
        eval_dataset=as_dataset(ROWS),
        processing_class=word_tokenizer(),
        compute_metrics=keep,
    )
    assert trainer.evaluate()["eval_seen"] == 1.0
    logits, labels = seen[0].predictions, seen[0].label_ids
    assert logits.shape[:2] == labels.shape
    assert len(labels) == len(ROWS)
    # Decisions only: the widest sample has many more tokens.
    assert labels.shape[1] == max(len(row.decision) for row in ROWS)
    for row, row_logits, row_labels in zip(ROWS, logits, labels, strict=True):
        length = len(row.decision)
        assert row_labels[:length].tolist() == row.decision_labels.tolist()
        assert (row_labels[length:] == IGNORED).all()
        with torch.no_grad():
            expected = model(input_ids=row.input_ids[None], use_cache=False).logits[0, row.boundary :]
        np.testing.assert_allclose(row_logits[:length], expected.numpy(), atol=2e-5)


@deprecated_in_trl
def test_logits_can_be_reduced_before_they_are_kept(tmp_path: Path) -> None:
    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        predicted = prediction.label_ids[:, 1:] != IGNORED
        hits = prediction.predictions[:, :-1][predicted] == prediction.label_ids[:, 1:][predicted]
        return {"accuracy": float(hits.mean())}

    for trainer in both(
        "llama",
        tmp_path,
        eval_dataset=as_dataset(ROWS),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        fields={"per_device_eval_batch_size": 8},
    ):
        metrics = trainer.evaluate()
        assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])


@deprecated_in_trl
def test_predictions_of_another_dataset(tmp_path: Path) -> None:
    ours, _ = both("llama", tmp_path)
    output = ours.predict(as_dataset(ROWS[:3]))
    assert output.predictions.shape[:2] == output.label_ids.shape == (3, max(len(row.decision) for row in ROWS[:3]))
    assert output.metrics["test_loss"] == pytest.approx(ours.evaluate(as_dataset(ROWS[:3]))["eval_loss"])
