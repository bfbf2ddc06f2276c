# SPDX-License-Identifier: Apache-2.0
"""What TRL sees of a batch."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import concatenate, send_to_device

from frozen_peft.context import TAIL
from frozen_peft.training.batches import BatchCutter, SampleBatch, from_first_label

IGNORED = -100


@pytest.mark.parametrize(
    ("labels", "first"),
    [
        ([[IGNORED, IGNORED, IGNORED, 5, 6]], 2),
        # The samples of a batch are cut at one token, the first that any of them needs.
        ([[IGNORED, IGNORED, IGNORED, IGNORED, 6], [IGNORED, IGNORED, 4, IGNORED, IGNORED]], 1),
        # Nothing predicts the first token.
        ([[3, IGNORED, IGNORED, IGNORED, 6]], 3),
        ([[3, 4, 5, 6, 7]], 0),
        ([[IGNORED] * 5, [IGNORED] * 5], 3),
        ([[3, IGNORED]], 0),
        ([[7]], 0),
    ],
)
def test_labels_are_cut_before_the_token_that_predicts_the_first(labels: list[list[int]], first: int) -> None:
    ids = torch.arange(len(labels[0])).expand(len(labels), -1)
    batch = {"input_ids": ids, "labels": torch.tensor(labels)}
    cut, found = from_first_label(batch)
    assert found == first
    assert cut["labels"].tolist() == [row[first:] for row in labels]
    assert cut["input_ids"] is ids
    assert batch["labels"].tolist() == labels


@pytest.mark.parametrize("batch", [{}, {"labels": torch.tensor([[1, 2]]), "shift_labels": torch.tensor([[2, 1]])}])
def test_without_labels_or_with_ones_that_are_shifted_nothing_is_cut(batch: dict[str, Any]) -> None:
    assert from_first_label(batch) == (batch, 0)


CUTTER = BatchCutter(TAIL, None, 0)


def cut_batch_of(*boundaries: int) -> SampleBatch:
    ids = torch.arange(8).expand(len(boundaries), -1).clone()
    labels = ids.clone()
    for row, boundary in zip(labels, boundaries, strict=True):
        row[: boundary + 1] = IGNORED
    return CUTTER.cut({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize(
    "on_its_way",
    [
        copy.copy,
        lambda batch: send_to_device(pickle.loads(pickle.dumps(batch)), torch.device("cpu")),
        lambda batch: send_to_device(batch, torch.device("cpu")),
        lambda batch: batch.to("cpu", non_blocking=True),
    ],
)
def test_a_dataloader_keeps_what_a_batch_was_cut_to(on_its_way: Callable[[SampleBatch], SampleBatch]) -> None:
    arrived = on_its_way(cut_batch_of(3, 5))
    assert arrived.is_cut
    assert CUTTER.cut(arrived) is arrived
    assert [len(context) for context in arrived.contexts] == [3, 5]


def test_batches_that_are_put_together_are_cut_anew() -> None:
    """As accelerate does where one process reads for all of them."""
    together = concatenate([cut_batch_of(3), cut_batch_of(5)])
    assert not together.is_cut
    assert [len(context) for context in CUTTER.cut(together).contexts] == [3, 5]


@pytest.mark.parametrize("name", ["labels", "input_ids"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_batch_that_was_changed_is_cut_anew(name: str, in_place: bool) -> None:
    batch = cut_batch_of(3)
    if in_place:
        batch[name][:, :6] = IGNORED if name == "labels" else 1
    else:
        batch[name] = torch.where(torch.arange(8) < 6, IGNORED if name == "labels" else 1, batch[name])
    assert not batch.is_cut
    again = CUTTER.cut(batch)
    assert again.is_cut
    (context,) = again.contexts
    assert context.tokens.tolist() == ([0, 1, 2, 3, 4] if name == "labels" else [1, 1, 1])
