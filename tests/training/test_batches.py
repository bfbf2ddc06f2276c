# SPDX-License-Identifier: Apache-2.0
"""What TRL sees of a batch."""

from typing import Any

import pytest
import torch

from frozen_peft.training.batches import from_first_label

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
