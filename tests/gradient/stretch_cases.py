# SPDX-License-Identifier: Apache-2.0
"""Gradients in stretches of the sequence, and the plain ones that they have to equal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frozen_peft.context import encode_context, use_segmented_attention
from frozen_peft.gradient import stretched_forward
from tests.frozen_runs import PADDING
from tests.reference import (
    CACHE,
    Sample,
    double_precision,
    negative_log_likelihood,
    num_labels,
    random_sample,
    stop_gradient_at_context,
    worst_gradient_error,
)
from tests.tiny_models import add_lora, tiny_model, to_double

TOLERANCE_FLOAT64 = 1e-10
TOLERANCE_FLOAT32 = 1e-4
# Ragged, two of them longer than two stretches of 64, with decisions that begin and end within a stretch.
ROWS = [random_sample(90, 41, seed=1), random_sample(30, 45, seed=2), random_sample(3, 127, seed=3)]
SHORT = [random_sample(23, 6, seed=4), random_sample(5, 9, seed=5)]


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: torch.zeros_like(weight) if gradient is None else gradient for (name, weight), gradient in pairs}


def reference(model: nn.Module, rows: Sequence[Sample], horizon: int = -1) -> dict[str, torch.Tensor]:
    """Mean over labels, one plain forward per sample; gradient stops `horizon` tokens before the decision."""
    total: dict[str, torch.Tensor] = {}
    for row in rows:
        frozen = 0 if horizon == -1 else max(row.boundary - horizon, 0)
        with stop_gradient_at_context(model, frozen, len(row.input_ids)):
            logits = model(input_ids=row.input_ids[None], use_cache=False).logits[0]
        for name, gradient in gradients_of(model, negative_log_likelihood(logits, row.labels)).items():
            total[name] = total.get(name, 0) + gradient / num_labels(rows)
    return total


def padded(rows: Sequence[Sample], first: Sequence[int]) -> dict[str, torch.Tensor]:
    """The samples from a token on, as a batch padded on the right."""
    width = max(len(row.input_ids) - start for row, start in zip(rows, first, strict=True))
    batch = {
        "input_ids": torch.full((len(rows), width), PADDING),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "position_ids": torch.tensor(first)[:, None] + torch.arange(width),
    }
    for index, (row, start) in enumerate(zip(rows, first, strict=True)):
        batch["input_ids"][index, : len(row.input_ids) - start] = row.input_ids[start:]
        batch["attention_mask"][index, : len(row.input_ids) - start] = 1
    return batch


def loss_in_stretches(
    model: nn.Module, rows: Sequence[Sample], size: int, horizon: int = -1, **options: Any
) -> torch.Tensor:
    """Mean over labels of the negative log-likelihood; with `first_output`, of logits from that token on."""
    skipped = options.get("first_output", 0)
    first = [0 if horizon == -1 else max(row.boundary - horizon, 0) for row in rows]
    batch: dict[str, Any] = padded(rows, first)
    if any(first):
        contexts = [row.input_ids[:start] for row, start in zip(rows, first, strict=True)]
        batch[CACHE] = encode_context(model, contexts)
    with stretched_forward(model, size, **options):
        logits = model(**batch, use_cache=False).logits
    assert logits.shape[:2] == (len(rows), batch["input_ids"].shape[1] - skipped)
    return sum(
        negative_log_likelihood(logits[index, : len(row.input_ids) - start - skipped], row.labels[start + skipped :])
        for index, (row, start) in enumerate(zip(rows, first, strict=True))
    ) / num_labels(rows)


def in_stretches(
    model: nn.Module, rows: Sequence[Sample], size: int, horizon: int = -1, **options: Any
) -> dict[str, torch.Tensor]:
    return gradients_of(model, loss_in_stretches(model, rows, size, horizon, **options))


@contextmanager
def in_double(name: str, *, segmented: bool = False, **config: Any) -> Iterator[nn.Module]:
    """A tiny model with adapters that computes in float64 throughout."""
    model = to_double(add_lora(tiny_model(name, **config)))
    if segmented:
        use_segmented_attention(model)
    with double_precision(model):
        yield model


def error_in_double(
    name: str, rows: Sequence[Sample], size: int, horizon: int = -1, *, first_output: int = 0, **options: Any
) -> float:
    """Worst error of an adapter's gradient against the plain one, in float64."""
    with in_double(name, **options) as model:
        actual = in_stretches(model, rows, size, horizon, first_output=first_output)
        return worst_gradient_error(actual, reference(model, rows, horizon))
