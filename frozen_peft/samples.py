# SPDX-License-Identifier: Apache-2.0
"""Checks on prepared datasets, made before training starts so that a message can name the sample.

A prepared dataset has `input_ids` and `labels`, as TRL leaves it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from frozen_peft.context.boundary import IGNORED_LABEL

__all__ = ["SampleLengths", "SampleLimits", "check_samples", "limit_length", "measure_samples", "require_rows"]

ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class SampleLengths:
    """Lengths in tokens, one entry per sample.

    Attributes:
        rows: Row of the dataset that the sample stands in; packed rows hold several samples.
        totals: Tokens of the sample.
        boundaries: Context tokens; -1 where no label is supervised.
    """

    rows: np.ndarray
    totals: np.ndarray
    boundaries: np.ndarray


def require_rows(dataset: Dataset | IterableDataset | None, name: str) -> None:
    """Refuses what the trainer could only fail on later.

    Raises:
        ValueError: The dataset is empty, or its samples carry images.
    """
    if dataset is None:
        return
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty. Check its file, split or filter.")
    if "image" in first or "images" in first:
        raise ValueError(
            f"The {name} dataset has an image column, which frozen contexts do not carry yet. Remove the images, or "
            "train with trl.SFTTrainer."
        )


def measure_samples(dataset: Dataset) -> SampleLengths:
    """Lengths and boundaries of every sample of a prepared dataset, packed or not."""
    parts = [_measure_table(table) for table in _tables(dataset)]
    rows, offset = [], 0
    for part_rows, _, _, num_rows in parts:
        rows.append(part_rows + offset)
        offset += num_rows
    return SampleLengths(
        np.concatenate(rows), np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
    )


@dataclass(frozen=True)
class SampleLimits:
    """What samples must keep to.

    Attributes:
        frozen: Contexts will be frozen.
        flattened: Samples will be packed or flattened into one row.
        max_positions: Positions that the model has; None where that is unknown.
        max_length: The longest sample in tokens, which `limit_length` cut to where it could.
        max_context_length: The longest context in tokens that batches will keep.
    """

    frozen: bool
    flattened: bool
    max_positions: int | None
    max_length: int | None
    max_context_length: int | None = None


def check_samples(dataset: Dataset | IterableDataset, name: str, limits: SampleLimits) -> Dataset | IterableDataset:
    """Checks every sample of a prepared dataset; of a stream, samples are checked as they come.

    Args:
        dataset: A prepared dataset.
        name: What to call it in messages, such as `train`.
        limits: What its samples must keep to.

    Returns:
        The dataset.

    Raises:
        ValueError: A sample has no supervised label, a decision longer than `max_length`, more tokens than the model
            has positions, or a context although samples are flattened.
    """
    if isinstance(dataset, IterableDataset):

        def check_one(sample: dict[str, Any], index: int) -> dict[str, Any]:
            table = pa.table({key: [sample[key]] for key in ("input_ids", "labels", "seq_lengths") if key in sample})
            rows, totals, boundaries, _ = _measure_table(table)
            _require_sound(SampleLengths(rows + index, totals, boundaries), name, limits)
            return sample

        return dataset.map(check_one, with_indices=True)
    _require_sound(measure_samples(dataset), name, limits)
    return dataset


def limit_length(
    dataset: Dataset | IterableDataset, max_length: int, name: str, num_proc: int | None
) -> Dataset | IterableDataset:
    """Cuts samples to `max_length` tokens: contexts at their start, samples without context at their end.

    A decision that is longer stays as it is, for `check_samples` to name it.
    """

    def cut(sample: dict[str, Any]) -> dict[str, Any]:
        input_ids, labels = sample["input_ids"], sample["labels"]
        excess = len(input_ids) - max_length
        if excess > 0:
            first = next((index for index, label in enumerate(labels) if label != IGNORED_LABEL), 0)
            boundary = max(first - 1, 0)
            kept = slice(min(excess, boundary), None) if boundary else slice(None, max_length)
            input_ids, labels = input_ids[kept], labels[kept]
        return {"input_ids": input_ids, "labels": labels}

    if isinstance(dataset, IterableDataset):
        return dataset.map(cut)
    return dataset.map(cut, num_proc=num_proc, desc=f"Limiting {name} dataset to {max_length} tokens")


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    yield from dataset.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_PER_BATCH)


def _measure_table(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Row, tokens and boundary of each sample in a table, and the number of its rows."""
    labels = table["labels" if "labels" in table.column_names else "input_ids"]
    values = pc.list_flatten(labels).to_numpy()
    row_lengths = pc.list_value_length(labels).to_numpy()
    if "seq_lengths" in table.column_names:
        totals = pc.list_flatten(table["seq_lengths"]).to_numpy()
        rows = np.repeat(np.arange(table.num_rows), pc.list_value_length(table["seq_lengths"]).to_numpy())
    else:
        totals, rows = row_lengths, np.arange(table.num_rows)
    starts = np.concatenate([[0], np.cumsum(totals)[:-1]]).astype(np.int64)
    supervised = np.append(np.flatnonzero(values != IGNORED_LABEL), len(values))
    first = supervised[np.searchsorted(supervised, starts)] - starts
    boundaries = np.where(first < totals, np.maximum(first - 1, 0), -1)
    return rows, totals, boundaries, table.num_rows


def _require_sound(samples: SampleLengths, name: str, limits: SampleLimits) -> None:
    contexts, totals = samples.boundaries, samples.totals
    decisions = totals - np.maximum(contexts, 0)
    if (found := _first(samples, contexts < 0)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has no supervised label in its {totals[found]} "
            "tokens, so it has no decision to train. Drop it, or check `completion_only_loss`, `assistant_only_loss` "
            "and the chat template."
        )
    if limits.flattened and limits.frozen and (found := _first(samples, contexts > 0)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has a context of {contexts[found]} tokens, and "
            "`packing` and `padding_free` put samples into one row, where contexts cannot be told apart. Set both to "
            "False (decisions are short: little is padded), or train with `tier: 1`."
        )
    limit = limits.max_length
    if limit is not None and not limits.flattened and (found := _first(samples, decisions > limit)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has a decision of {decisions[found]} tokens, "
            f"longer than `max_length={limit}`, and a decision is never cut. Raise `max_length` (None: no limit), or "
            "shorten the sample."
        )
    positions, kept = limits.max_positions, totals
    if limits.max_context_length is not None:
        kept = decisions + np.clip(contexts, 0, limits.max_context_length)
    if positions is not None and (found := _first(samples, kept > positions)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has {totals[found]} tokens, {contexts[found]} "
            f"of them context, and the model has {positions} positions. Set `max_context_length` or "
            "`max_length`, or use a model with longer contexts."
        )


def _first(samples: SampleLengths, matches: np.ndarray) -> int | None:
    """Index of the first sample that matches."""
    indices = np.flatnonzero(matches)
    return int(indices[0]) if len(indices) else None
