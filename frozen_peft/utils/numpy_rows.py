# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset as arrays."""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset

__all__ = ["numpy_rows"]

# Read at a time, which takes a fraction of the time of one by one.
NUM_ROWS = 100


def numpy_rows(dataset: Dataset, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Each row with those of some columns that the dataset has, lists of numbers as arrays."""
    present = [column for column in columns if column in dataset.column_names]
    for batch in dataset.select_columns(present).with_format("numpy").iter(batch_size=NUM_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
