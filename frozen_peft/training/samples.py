# SPDX-License-Identifier: Apache-2.0
"""Checks on prepared datasets, made before training starts so that a message can name the sample.

A prepared dataset has `input_ids` and `labels`, as TRL leaves it.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from frozen_peft.context.boundary import IGNORED_LABEL, TAIL, Cut
from frozen_peft.data import require_no_dates

__all__ = [
    "SampleLengths",
    "SampleLimits",
    "check_samples",
    "limit_length",
    "measure_samples",
    "measure_table",
    "require_rows",
]

logger = logging.get_logger(__name__)

ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class SampleLengths:
    """Lengths in tokens, one entry per sample, or per decision with the tokens up to its end (`Cut.mode` of `turns`).

    Attributes:
        rows: Row of the dataset that the sample stands in; packed rows and conversations hold several.
        totals: Tokens of the sample.
        boundaries: Context tokens; -1 where no label is supervised.
        invoked: Whether the decision begins with the invocation tokens.
        invoked_again: Whether they come again in it.
        starts: Tokens that stay of the context's beginning, where others are dropped; 0 where none are.
        dropped: Context tokens that are.
    """

    rows: np.ndarray
    totals: np.ndarray
    boundaries: np.ndarray
    invoked: np.ndarray
    invoked_again: np.ndarray
    starts: np.ndarray
    dropped: np.ndarray


def require_rows(dataset: Dataset | IterableDataset | None, name: str) -> None:
    """Refuses what the trainer could only fail on later.

    Raises:
        ValueError: The dataset is empty, its samples carry images, or text in it was taken for dates.
    """
    if dataset is None:
        return
    require_no_dates(dataset, name)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty. Check its file, split or filter.")
    if "image" in first or "images" in first:
        raise ValueError(
            f"The {name} dataset has an image column, which frozen contexts do not carry yet. Remove the images, or "
            "train with trl.SFTTrainer."
        )


def measure_samples(dataset: Dataset, cut: Cut = TAIL) -> SampleLengths:
    """Lengths and boundaries of every sample of a prepared dataset, packed or not, as `cut` will cut it."""
    parts, offset = [], 0
    for table in _tables(dataset):
        parts.append(measure_table(table, cut, offset))
        offset += table.num_rows
    return SampleLengths(*(np.concatenate(arrays) for arrays in zip(*map(astuple, parts), strict=True)))


def measure_table(table: pa.Table, cut: Cut, first_row: int = 0) -> SampleLengths:
    """Lengths of the samples in a table whose first row is `first_row` of the dataset."""
    labels = table["labels" if "labels" in table.column_names else "input_ids"]
    supervised = np.not_equal(pc.list_flatten(labels).to_numpy(), IGNORED_LABEL)
    row_lengths = pc.list_value_length(labels).to_numpy()
    if "seq_lengths" in table.column_names:
        totals = pc.list_flatten(table["seq_lengths"]).to_numpy()
        rows = np.repeat(np.arange(table.num_rows), pc.list_value_length(table["seq_lengths"]).to_numpy())
    else:
        totals, rows = row_lengths, np.arange(table.num_rows)
    starts = np.concatenate([[0], np.cumsum(totals)[:-1]]).astype(np.int64)
    if cut.mode == "turns":
        rows, starts, firsts, stops = _turns(supervised, rows, starts, totals)
    else:
        places = np.append(np.flatnonzero(supervised), len(supervised))
        firsts, stops = places[np.searchsorted(places, starts)], starts + totals
    has_decision = firsts < stops
    boundaries = np.where(has_decision, np.maximum(firsts - starts - (len(cut.invocation) or 1), 0), -1)
    invoked, invoked_again = has_decision | True, has_decision & False
    if cut.invocation:
        input_ids = pc.list_flatten(table["input_ids"]).to_numpy()
        invoked, invoked_again = _invocations(input_ids, np.asarray(cut.invocation), starts, firsts, stops)
    totals = stops - starts
    kept_starts, dropped = np.zeros_like(totals), np.zeros_like(totals)
    if cut.max_context_length is not None or cut.max_length is not None:
        input_ids = pc.list_flatten(table["input_ids"]).to_numpy()
        for index in np.flatnonzero(boundaries > 0):
            boundary, place = int(boundaries[index]), int(starts[index])
            if excess := cut.num_excess(boundary, int(totals[index])):
                kept_starts[index] = cut.start.length(input_ids[place : place + boundary])
                dropped[index] = min(excess, boundary - kept_starts[index])
    return SampleLengths(rows + first_row, totals, boundaries, invoked, invoked_again, kept_starts, dropped)


@dataclass(frozen=True)
class SampleLimits:
    """What samples must keep to.

    Attributes:
        frozen: Contexts will be frozen.
        flattened: Samples will be packed or flattened into one row.
        max_positions: Positions that the model has; None where that is unknown.
        max_length: The longest sample in tokens, which `limit_length` cut to where it could.
        cut: How batches will be cut.
    """

    frozen: bool
    flattened: bool
    max_positions: int | None
    max_length: int | None
    cut: Cut = TAIL


def check_samples(
    dataset: Dataset | IterableDataset, name: str, limits: SampleLimits, *, says_cuts: bool = False
) -> Dataset | IterableDataset:
    """Checks every sample of a prepared dataset; of a stream, samples are checked as they come.

    Args:
        dataset: A prepared dataset.
        name: What to call it in messages, such as `train`.
        limits: What its samples must keep to.
        says_cuts: Whether to log what will be cut of the samples of a dataset that is no stream.

    Returns:
        The dataset.

    Raises:
        ValueError: A sample has no supervised label, a decision longer than `max_length`, more tokens than the model
            has positions, or a context although samples are flattened.
    """
    if isinstance(dataset, IterableDataset):

        def check_one(sample: dict[str, Any], index: int) -> dict[str, Any]:
            table = pa.table({key: [sample[key]] for key in ("input_ids", "labels", "seq_lengths") if key in sample})
            _require_sound(measure_table(table, limits.cut, index), name, limits)
            return sample

        return dataset.map(check_one, with_indices=True)
    samples = measure_samples(dataset, limits.cut)
    _require_sound(samples, name, limits)
    if says_cuts:
        _say_cuts(samples, name, limits.cut)
    return dataset


def limit_length(
    dataset: Dataset | IterableDataset, max_length: int, name: str, num_proc: int | None, cut: Cut = TAIL
) -> Dataset | IterableDataset:
    """Cuts samples to `max_length` tokens: contexts behind their start, samples without context at their end.

    A decision that is longer stays as it is, for `check_samples` to name it.

    Args:
        dataset: A prepared dataset.
        max_length: In tokens.
        name: What to call it in messages.
        num_proc: Processes to cut with.
        cut: Which tokens a decision begins with, and what stays of a context's start.

    Raises:
        ValueError: A decision and what stays of its context's start have more tokens.
    """
    cut = Cut(max_length=max_length, invocation=cut.invocation, start=cut.start)

    def limit(sample: dict[str, Any], index: int) -> dict[str, Any]:
        input_ids, labels = sample["input_ids"], sample["labels"]
        if len(input_ids) > max_length:
            first = next((index for index, label in enumerate(labels) if label != IGNORED_LABEL), 0)
            boundary = max(first - (len(cut.invocation) or 1), 0)
            if first > 1:
                start = cut.start.length(np.asarray(input_ids[:boundary]))
                num_decision = len(input_ids) - boundary
                if start and num_decision <= max_length < start + num_decision:
                    raise ValueError(_no_room(index, name, start, "max_length", max_length, start + num_decision))
                stop = min(start + len(input_ids) - max_length, boundary)
                input_ids, labels = ([*row[:start], *row[stop:]] for row in (input_ids, labels))
            else:
                input_ids, labels = input_ids[:max_length], labels[:max_length]
        return {"input_ids": input_ids, "labels": labels}

    if isinstance(dataset, IterableDataset):
        return dataset.map(limit, with_indices=True)
    _say_cuts(measure_samples(dataset, cut), name, cut)
    desc = f"Limiting {name} dataset to {max_length} tokens"
    return dataset.map(limit, with_indices=True, num_proc=num_proc, desc=desc)


def _say_cuts(samples: SampleLengths, name: str, cut: Cut) -> None:
    """Logs how many contexts lose how much, if any do."""
    if not samples.dropped.any():
        return
    limits = {"max_context_length": cut.max_context_length, "max_length": cut.max_length}
    given = " and ".join(f"`{limit}={value}`" for limit, value in limits.items() if value is not None)
    is_cut = samples.dropped > 0
    num_kept = int(samples.starts[is_cut].max())
    stays = f"up to {num_kept} tokens of their beginning and the latest stay" if num_kept else "the latest stay"
    logger.warning(
        f"{given}: of the {name} dataset, {len(set(samples.rows[is_cut]))} of {len(set(samples.rows))} samples lose "
        f"{int(samples.dropped.sum())} of the {int(samples.boundaries.clip(min=0).sum())} tokens of their contexts; "
        f"{stays} (`keep_context_start`)."
    )


def _tables(dataset: Dataset) -> Iterator[pa.Table]:
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    yield from dataset.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_PER_BATCH)


def _turns(
    supervised: np.ndarray, rows: np.ndarray, starts: np.ndarray, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, start of the sample, first label and end of each supervised span; a sample without any has one, empty."""
    # Padded, and with a gap before each sample, so that every span has a place before and one after it.
    shift = np.repeat(np.arange(1, len(starts) + 1), totals)
    spread = np.zeros(len(supervised) + len(starts) + 1, dtype=np.int8)
    spread[np.arange(len(supervised)) + shift] = supervised
    steps = np.diff(spread)
    firsts, stops = np.flatnonzero(steps == 1) + 1, np.flatnonzero(steps == -1) + 1
    spread_starts = starts + np.arange(1, len(starts) + 1)
    owner = np.searchsorted(spread_starts, firsts, side="right") - 1
    firsts, stops = firsts - owner - 1, stops - owner - 1
    # A first token's label is predicted by nothing.
    predicted = stops - starts[owner] > 1
    owner, firsts, stops = owner[predicted], firsts[predicted], stops[predicted]
    without = np.setdiff1d(np.arange(len(starts)), owner)
    owner = np.concatenate([owner, without])
    firsts, stops = (np.concatenate([ends, starts[without] + totals[without]]) for ends in (firsts, stops))
    order = np.lexsort((firsts, owner))
    return rows[owner[order]], starts[owner[order]], firsts[order], stops[order]


def _invocations(
    input_ids: np.ndarray, invocation: np.ndarray, starts: np.ndarray, firsts: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each decision begins with the invocation tokens, and whether they come again in it."""
    length = len(invocation)
    num_places = max(len(input_ids) - length + 1, 0)
    matches = [input_ids[offset : offset + num_places] == token for offset, token in enumerate(invocation)]
    places = np.flatnonzero(np.logical_and.reduce(matches))
    begins = firsts - length
    invoked = np.isin(begins, places) & (begins >= starts)
    num_before = np.searchsorted(places, begins, side="right")
    return invoked, np.searchsorted(places, stops - length, side="right") > num_before


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
    invocation = list(limits.cut.invocation)
    if (found := _first(samples, ~samples.invoked)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has a decision that does not begin with the "
            f"invocation tokens {invocation}, where `context_adapters=False` switches the adapter on. Set "
            "`invocation` to the text just before every supervised span, or `context_adapters=True`."
        )
    if (found := _first(samples, samples.invoked_again)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has a decision that contains the invocation tokens "
            f"{invocation} again, and an activated adapter is switched on at their last occurrence only. Set "
            "`decision_mode='turns'` if it holds several turns, or `context_adapters=True`."
        )
    limit = limits.max_length
    if limit is not None and not limits.flattened and (found := _first(samples, decisions > limit)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has a decision of {decisions[found]} tokens, "
            f"longer than `max_length={limit}`, and a decision is never cut. Raise `max_length` (None: no limit), or "
            "shorten the sample."
        )
    _require_room(samples, name, limits.cut)
    positions, kept = limits.max_positions, totals
    if limits.cut.max_context_length is not None:
        kept = decisions + np.clip(contexts, 0, limits.cut.max_context_length)
    if limits.cut.max_length is not None:
        kept = np.minimum(kept, limits.cut.max_length)
    if positions is not None and (found := _first(samples, kept > positions)) is not None:
        raise ValueError(
            f"Sample {samples.rows[found]} of the {name} dataset has {totals[found]} tokens, {contexts[found]} "
            f"of them context, and the model has {positions} positions. Set `max_context_length` or "
            "`max_length`, or use a model with longer contexts."
        )


def _require_room(samples: SampleLengths, name: str, cut: Cut) -> None:
    """Refuses limits that leave no room for what stays of a context's beginning."""
    with_decision = samples.totals - samples.boundaries.clip(min=0) + samples.starts
    for field, needed in (("max_context_length", samples.starts), ("max_length", with_decision)):
        limit = getattr(cut, field)
        if limit is not None and (found := _first(samples, (needed > limit) & (samples.starts > 0))) is not None:
            raise ValueError(
                _no_room(samples.rows[found], name, int(samples.starts[found]), field, limit, int(needed[found]))
            )


def _no_room(row: int, name: str, num_start: int, field: str, limit: int, needed: int) -> str:
    beside = f", which with the decision are {needed}" if needed > num_start else ""
    return (
        f"Sample {row} of the {name} dataset begins with {num_start} tokens that stay (its beginning-of-sequence "
        f"token, and what `keep_context_start` says){beside}, more than `{field}={limit}`. Raise it, or keep less."
    )


def _first(samples: SampleLengths, matches: np.ndarray) -> int | None:
    """Index of the first sample that matches."""
    indices = np.flatnonzero(matches)
    return int(indices[0]) if len(indices) else None
