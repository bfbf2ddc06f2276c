# SPDX-License-Identifier: Apache-2.0
"""Samples with and without their instructions, and what distilling them has to compute, by plain forwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from tests.reference import IGNORED, Sample, random_sample
from tests.training.runs import RAGGED, adapted, stopped_forward


@dataclass(frozen=True)
class Pair:
    """One sample as the student sees it, and as the teacher does."""

    student: Sample
    teacher: Sample


@dataclass(frozen=True)
class Loss:
    """What is distilled, in the words of the configuration."""

    direction: str = "forward_kl"
    top_k: int = 0
    temperature: float = 1.0
    likelihood_weight: float = 0.0
    beta: float = 0.5

    @property
    def fields(self) -> dict[str, object]:
        return {
            "loss_type": "distill",
            "distill_divergence": self.direction,
            "distill_top_k": self.top_k,
            "distill_temperature": self.temperature,
            "distill_likelihood_weight": self.likelihood_weight,
            "distill_beta": self.beta,
        }


def pairs(shapes: Sequence[tuple[int, int]] = RAGGED) -> list[Pair]:
    """Random samples of the given boundaries and decision lengths; the teacher's have 13 tokens more in front."""
    made = []
    for seed, (boundary, length) in enumerate(shapes):
        sample = random_sample(boundary, length, seed=seed)
        if not boundary:
            # Supervised from the start; behind instructions the first token is predicted too.
            sample = Sample(sample.input_ids, sample.input_ids.clone())
        instructions = random_sample(13, 0, seed=100 + seed).input_ids
        made.append(
            Pair(
                sample,
                Sample(
                    torch.cat([instructions, sample.input_ids]),
                    torch.cat([torch.full_like(instructions, IGNORED), sample.labels]),
                ),
            )
        )
    return made


def sharp(name: str = "qwen3_5_text", **config_overrides: Any) -> PeftModel:
    """A tiny model with adapters whose distributions are far from uniform and from each other.

    The gradient of a divergence is a difference of probabilities, of which little but rounding is left between
    nearly equal ones.
    """
    model = adapted(name, **config_overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


def as_dataset(rows: Sequence[Pair]) -> Dataset:
    """A dataset as the trainer prepares it."""
    return Dataset.from_dict(
        {
            "input_ids": [row.student.input_ids.tolist() for row in rows],
            "labels": [row.student.labels.tolist() for row in rows],
            "teacher_input_ids": [row.teacher.input_ids.tolist() for row in rows],
            "teacher_labels": [row.teacher.labels.tolist() for row in rows],
        }
    )


def num_labels(rows: Sequence[Pair]) -> int:
    return sum(int((row.student.labels[1:] != IGNORED).sum()) for row in rows)


@torch.no_grad()
def teacher_logits(model: PeftModel, row: Pair) -> torch.Tensor:
    """Logits of the base model over the whole sample with instructions, where the student predicts: `[labels, V]`."""
    with model.disable_adapter():
        logits = model(input_ids=row.teacher.input_ids[None], use_cache=False).logits[0]
    predicting = logits[:-1][row.teacher.labels[1:] != IGNORED]
    return predicting[len(predicting) - num_labels([row]) :]


def divergences(student: torch.Tensor, teacher: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Divergence of each token, from logits `[labels, V]` of both, by probabilities over the whole vocabulary."""
    p = (teacher.double() / loss.temperature).softmax(-1)
    q = (student.double() / loss.temperature).softmax(-1)
    if loss.top_k:
        rows = []
        for own, other in zip(p, q, strict=True):
            order = own.argsort(descending=True)
            first, rest = order[: loss.top_k], order[loss.top_k :]
            rows.append([torch.cat([part[first], part[rest].sum()[None]]) for part in (own, other)])
        p, q = (torch.stack(part) for part in zip(*rows, strict=True))
    if loss.direction == "jsd":
        m = loss.beta * p + (1 - loss.beta) * q
        of_teacher, of_student = ((own * (own.log() - m.log())).sum(-1) for own in (p, q))
        return loss.temperature**2 * (loss.beta * of_teacher + (1 - loss.beta) * of_student)
    if loss.direction == "reverse_kl":
        p, q = q, p
    return loss.temperature**2 * (p * (p.log() - q.log())).sum(-1)


def reference_loss(model: PeftModel, rows: Sequence[Pair], loss: Loss, *, horizon: int = 0) -> torch.Tensor:
    """Mean over all labels, with the student's gradient stopped at context positions; a scalar in the graph."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = student_logits(model, row.student, horizon)
        divergence = divergences(logits, teacher_logits(model, row), loss).sum()
        logprobs = logits.log_softmax(-1)
        labels = row.student.labels[1:][row.student.labels[1:] != IGNORED]
        nll = -logprobs.gather(-1, labels[:, None]).sum()
        total = total + (1 - loss.likelihood_weight) * divergence + loss.likelihood_weight * nll
    return total / num_labels(rows)


def student_logits(model: nn.Module, row: Sample, horizon: int = 0) -> torch.Tensor:
    """Logits where a label is predicted `[labels, V]`, by one plain forward with a stop-gradient at the context."""
    if horizon == -1:
        logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
    else:
        logits = stopped_forward(model, row).logits[0]
    return logits[:-1][row.labels[1:] != IGNORED]
