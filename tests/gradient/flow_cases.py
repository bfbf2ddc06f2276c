# SPDX-License-Identifier: Apache-2.0
"""Samples whose gradient flow is measured, and what direct autograd makes of them."""

from collections.abc import Sequence
from typing import Literal

import torch
from peft import PeftModel
from torch import nn

from frozen_peft.adapters import find_roles
from frozen_peft.gradient.flow import GradientFlow, GradientShare
from tests.frozen_runs import PADDING
from tests.reference import Sample, negative_log_likelihood, num_labels, random_sample, reference_gradients

TOLERANCE = 1e-4
# Ragged; one decision of a single label, one context of a single token, one longer than a stretch of 64.
ROWS = (random_sample(57, 11, seed=1), random_sample(31, 2, seed=2), random_sample(1, 9, seed=3))
LONG = random_sample(90, 41, seed=4)
STRETCH = 64


def whole(sample: Sample) -> Sample:
    """The sample with all of its tokens supervised, so that it has no context."""
    return Sample(sample.input_ids, sample.input_ids.clone())


def collated(rows: Sequence[Sample], side: Literal["left", "right"] = "right") -> dict[str, torch.Tensor]:
    """The samples as one batch, padded with an ordinary token."""
    width = max(len(row.input_ids) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), PADDING),
        "labels": torch.full((len(rows), width), -100),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
    }
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        own = slice(0, length) if side == "right" else slice(width - length, width)
        batch["input_ids"][index, own] = row.input_ids
        batch["labels"][index, own] = row.labels
        batch["attention_mask"][index, own] = 1
    return batch


def full_gradients(model: nn.Module, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Of the mean over all labels, by one plain forward and backward per sample, for every `lora_B`."""
    weights = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in rows:
        loss = negative_log_likelihood(model(input_ids=row.input_ids[None], use_cache=False).logits[0], row.labels)
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient / num_labels(rows)
    return total


def frozen_gradients(model: nn.Module, rows: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The same with a stop-gradient on everything computed at context positions."""
    return {name: value for name, value in reference_gradients(model, rows).items() if "lora_B" in name}


def expected_share(frozen: torch.Tensor, full: torch.Tensor) -> GradientShare:
    """By the formulas of the documentation."""
    frozen, full = frozen.double().flatten(), full.double().flatten()
    return GradientShare(
        float(frozen.norm()),
        float(full.norm()),
        float(frozen @ full / (frozen.norm() * full.norm())),
        float((full - frozen).norm() / full.norm()),
    )


def assert_gradients(
    flow: GradientFlow, model: PeftModel, frozen: dict[str, torch.Tensor], full: dict[str, torch.Tensor]
) -> None:
    """Norms, cosines and shares of every projection and of all together are those of these gradients."""
    found = {(part.module, part.role): part.gradient for part in flow.horizons[0].projections}
    expected = {}
    for match in find_roles(model):
        name = f"base_model.model.{match.module}.lora_B.default.weight"
        if name in full:
            rows = [row for start, stop in match.rows or ((0, match.out_features),) for row in range(start, stop)]
            expected[match.module, match.role] = (frozen[name][rows], full[name][rows])
    assert {place for place in found if place[1] != "other"} == set(expected)
    for place, (own, whole_gradient) in expected.items():
        assert_share(found[place], expected_share(own, whole_gradient))
    everything = [torch.cat([part.flatten() for part in parts.values()]) for parts in (frozen, full)]
    assert_share(flow.horizons[0].total, expected_share(*everything))


def assert_share(actual: GradientShare, expected: GradientShare) -> None:
    """Norms within a relative 1e-4, cosine and share within 1e-4."""
    assert abs(actual.frozen_norm - expected.frozen_norm) <= TOLERANCE * expected.full_norm
    assert abs(actual.full_norm - expected.full_norm) <= TOLERANCE * expected.full_norm
    assert actual.cosine is not None
    assert actual.context_share is not None
    assert abs(actual.cosine - expected.cosine) <= TOLERANCE
    assert abs(actual.context_share - expected.context_share) <= TOLERANCE
