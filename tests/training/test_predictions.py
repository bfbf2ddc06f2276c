# SPDX-License-Identifier: Apache-2.0
"""What a metric sees: every label once, beside the logits and inputs that predict it, in one row per sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction
from trl import SFTConfig, SFTTrainer

from frozen_peft import FrozenContextTrainer
from tests.reference import Sample, num_labels
from tests.training.runs import IGNORED, adapted, as_dataset, config, word_tokenizer
from tests.training.test_turns import conversation

# TRL 1.16 announces that metrics from logits go in its 2.0.
pytestmark = pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")

# Spans as (context tokens before, labels): many in one sample, one, one from the start, and one with tokens behind it.
ROWS = [
    conversation(spans, seed)
    for seed, spans in enumerate(
        (
            ((30, 7), (9, 1), (1, 5), (26, 4)),
            ((63, 3),),
            ((0, 4), (20, 6)),
            ((41, 5), (3, 0)),
            ((12, 2), (8, 3), (5, 1)),
        )
    )
]
TOLERANCE = 2e-5


@torch.no_grad()
def plain_predictions(model: torch.nn.Module, row: Sample) -> list[tuple[int, int, torch.Tensor]]:
    """Of one plain forward over a sample, for each label: the token before it, the label, the logits for it."""
    logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
    tokens, labels = row.input_ids.tolist(), row.labels.tolist()
    return [(tokens[at - 1], labels[at], logits[at - 1]) for at in range(1, len(labels)) if labels[at] != IGNORED]


def assert_rows_are_the_samples(
    logits: np.ndarray, labels: np.ndarray, inputs: np.ndarray | None, rows: Sequence[Sample]
) -> None:
    """Holds what a metric gets to plain forwards over each sample by itself."""
    model = adapted("llama")
    assert len(logits) == len(labels) == len(rows)
    assert logits.shape[:2] == labels.shape
    assert inputs is None or inputs.shape == labels.shape
    for index, row in enumerate(rows):
        expected = plain_predictions(model, row)
        found = [at for at in range(1, labels.shape[1]) if labels[index, at] != IGNORED]
        assert [labels[index, at] for at in found] == [label for _, label, _ in expected]
        for at, (token, label, plain) in zip(found, expected, strict=True):
            np.testing.assert_allclose(logits[index, at - 1], plain.numpy(), atol=TOLERANCE)
            if inputs is not None:
                assert (inputs[index, at - 1], inputs[index, at]) == (token, label)


def mean_of_batches(rows: Sequence[Sample], size: int) -> float:
    """transformers' loss of an evaluation: of each batch the mean over its labels, weighed by its samples."""
    model, total = adapted("llama"), 0.0
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        losses = [
            -logits.log_softmax(-1)[label].item()
            for row in batch
            for _, label, logits in plain_predictions(model, row)
        ]
        assert len(losses) == num_labels(batch)
        total += len(batch) * sum(losses) / len(losses)
    return total / len(rows)


class Seen:
    """A metric that keeps what it was given, at once or batch by batch."""

    def __init__(self) -> None:
        self.predictions: list[EvalPrediction] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.predictions.append(prediction)
        return {"calls": float(len(self.predictions))} if compute_result else {}


def evaluate(folder: Path, metric: Any, *, kind: type[SFTTrainer] = FrozenContextTrainer, **fields: Any) -> SFTTrainer:
    options = {"preprocess_logits_for_metrics": fields.pop("preprocess", None)}
    arguments = config(folder, include_for_metrics=["inputs", "loss"], **fields)
    if kind is SFTTrainer:
        arguments = config(folder, SFTConfig, include_for_metrics=["inputs", "loss"], **fields)
    return kind(
        adapted("llama"),
        arguments,
        train_dataset=as_dataset(ROWS),
        eval_dataset=as_dataset(ROWS),
        processing_class=word_tokenizer(),
        compute_metrics=metric,
        **options,
    )


@pytest.mark.parametrize(
    ("mode", "size", "fields"),
    [
        ("turns", 2, {}),
        ("turns", 4, {"max_decisions_per_forward": 3}),
        ("turns", 5, {"max_decisions_per_forward": 1, "eval_accumulation_steps": 1}),
        ("turns", 2, {"gradient_horizon": 12, "eval_accumulation_steps": 2}),
        ("turns", 3, {"eval_do_concat_batches": False}),
        ("tail", 2, {}),
        ("tail", 4, {"gradient_horizon": 12, "eval_accumulation_steps": 1}),
    ],
    ids=str,
)
def test_every_label_once_beside_its_logits_and_inputs(
    mode: str, size: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    seen = Seen()
    trainer = evaluate(tmp_path, seen, decision_mode=mode, per_device_eval_batch_size=size, **fields)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(mean_of_batches(ROWS, size), abs=TOLERANCE)
    (prediction,) = seen.predictions
    parts = (prediction.predictions, prediction.label_ids, prediction.inputs)
    if fields.get("eval_do_concat_batches", True):
        assert_rows_are_the_samples(*parts, ROWS)
        return
    for start, of_batch in zip(range(0, len(ROWS), size), zip(*parts, strict=True), strict=True):
        assert_rows_are_the_samples(*of_batch, ROWS[start : start + size])


@pytest.mark.parametrize("mode", ["turns", "tail"])
def test_a_metric_that_is_given_batches(mode: str, tmp_path: Path) -> None:
    """The inputs it gets are the whole batch, whose labels and mask are those of the decisions too."""
    seen = Seen()
    fields = {"decision_mode": mode, "per_device_eval_batch_size": 2, "max_decisions_per_forward": 2}
    evaluate(tmp_path, seen, batch_eval_metrics=True, **fields).evaluate()
    assert len(seen.predictions) == 3
    for index, prediction in enumerate(seen.predictions):
        batch = prediction.inputs
        rows = ROWS[2 * index : 2 * index + 2]
        assert_rows_are_the_samples(
            prediction.predictions.numpy(), prediction.label_ids.numpy(), batch["input_ids"].numpy(), rows
        )
        assert torch.equal(batch["labels"], prediction.label_ids)
        assert not bool(((batch["labels"] != IGNORED) & ~batch["attention_mask"].bool()).any())


@pytest.mark.parametrize("mode", ["turns", "tail"])
def test_predictions_of_another_dataset(mode: str, tmp_path: Path) -> None:
    trainer = evaluate(tmp_path, None, decision_mode=mode, max_decisions_per_forward=2)
    output = trainer.predict(as_dataset(ROWS[:3]))
    assert_rows_are_the_samples(output.predictions, output.label_ids, None, ROWS[:3])
    assert output.metrics["test_loss"] == pytest.approx(mean_of_batches(ROWS[:3], 2), abs=TOLERANCE)


@pytest.mark.parametrize("mode", ["turns", "tail"])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_figures_of_a_metric_are_those_of_sft_trainer(mode: str, reduced: bool, tmp_path: Path) -> None:
    """One as people write it: shifted by one, reduced before it is kept or not, by sample and over all labels."""

    def figures(prediction: EvalPrediction) -> dict[str, float]:
        labels, inputs = prediction.label_ids[:, 1:], prediction.inputs
        best = prediction.predictions[:, :-1]
        best = best if reduced else best.argmax(-1)
        is_label = labels != IGNORED
        assert (inputs[:, 1:][is_label] == labels[is_label]).all()
        hits = (best == labels) & is_label
        return {
            "accuracy": hits.sum() / is_label.sum(),
            "mean_of_samples": (hits.sum(1) / is_label.sum(1)).mean(),
            # Depends on which token was predicted where, and after which.
            "checksum": float(((best + 1) * (inputs[:, :-1] + 1) * is_label).sum()),
            "labels": float(is_label.sum()),
            "losses": float(prediction.losses.mean()),
        }

    preprocess = (lambda logits, labels: logits.argmax(-1)) if reduced else None
    fields = {"per_device_eval_batch_size": 4, "preprocess": preprocess}
    theirs = evaluate(tmp_path, figures, kind=SFTTrainer, **fields).evaluate()
    assert theirs["eval_labels"] == num_labels(ROWS) > len(ROWS)
    assert theirs["eval_checksum"] > 0
    ours = evaluate(tmp_path, figures, tier=1, **fields).evaluate()
    frozen = evaluate(tmp_path, figures, tier=2, decision_mode=mode, max_decisions_per_forward=2, **fields).evaluate()
    for name in ("accuracy", "mean_of_samples", "checksum", "labels", "losses", "loss"):
        assert ours[f"eval_{name}"] == pytest.approx(theirs[f"eval_{name}"], abs=TOLERANCE)
        assert frozen[f"eval_{name}"] == pytest.approx(theirs[f"eval_{name}"], abs=TOLERANCE)
