# SPDX-License-Identifier: Apache-2.0
"""Checks on prepared datasets, made before training starts so that a message can name the sample.

A prepared dataset has `input_ids` and `labels`, as TRL leaves it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers.utils import logging

from frozen_peft.context.boundary import TAIL, Cut, decision_spans, decision_start
from frozen_peft.context.branches import BRANCHES, unfold_branches
from frozen_peft.data import require_no_dates
from frozen_peft.utils.numpy_rows import numpy_rows

__all__ = [
    "SampleLengths",
    "SampleLimits",
    "check_samples",
    "limit_length",
    "measure_row",
    "measure_samples",
    "require_rows",
    "row_sequences",
]

logger = logging.get_logger(__name__)

# What samples are measured by; a row has one of the last where several are packed into it, or are branches of it.
TOKEN_COLUMNS = ("input_ids", "labels", "seq_lengths", BRANCHES)


@dataclass(frozen=True, slots=True)
class SampleLengths:
    """Lengths in tokens of a sample, or of a decision with the tokens up to its end (`Cut.mode` of `turns`).

    Attributes:
        row: Row of the dataset that the sample stands in; packed rows and conversations hold several.
        total: Tokens of the sample.
        context: Context tokens.
        has_decision: Whether a label is supervised.
        start: Tokens that stay of the context's beginning, where others are dropped; 0 where none are.
        dropped: Context tokens that are.
        shared: Context tokens that the context before it in the row has too.
    """

    row: int
    total: int
    context: int = 0
    has_decision: bool = True
    start: int = 0
    dropped: int = 0
    shared: int = 0

    @property
    def decision(self) -> int:
        """Decision tokens."""
        return self.total - self.context


def require_rows(dataset: Dataset | IterableDataset | None, name: str) -> None:
    """Refuses what the trainer could only fail on later.

    Raises:
        ValueError: The dataset is empty, its samples carry images, or text in it was taken for dates.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        # TRL says what it takes.
        return
    require_no_dates(dataset, name)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty. Check its file, split or filter.")
    if "image" in first or "images" in first:
        raise ValueError(
            f"The {name} dataset has an image column, which frozen contexts do not carry yet. Remove the images, or "
            "train with TRL's own trainer."
        )


def measure_samples(dataset: Dataset, cut: Cut = TAIL, name: str = "train") -> Iterator[SampleLengths]:
    """Lengths of every sample of a prepared dataset, packed or not, as `cut` will cut it."""
    rows = numpy_rows(dataset, TOKEN_COLUMNS)
    # The delay keeps the bar away from datasets that are measured in a moment.
    bar = tqdm(rows, desc=f"Measuring {name} dataset", total=len(dataset), unit=" rows", delay=2)
    for index, row in enumerate(bar):
        yield from measure_row(row, index, cut, name)


def measure_row(row: Mapping[str, Any], index: int, cut: Cut, name: str = "train") -> Iterator[SampleLengths]:
    """Lengths of the samples in one row of a dataset, which has this index.

    Raises:
        ValueError: See `decision_start`; the message names the sample and the dataset.
    """
    branches = row[BRANCHES][::2] if BRANCHES in row else itertools.repeat(0)
    before = 0
    for (input_ids, labels), shared in zip(row_sequences(row), branches, strict=False):
        spans, before = decision_spans(labels, cut.mode), min(before, int(shared))
        for first, end in spans:
            try:
                context = decision_start(input_ids, first, end, cut.invocation)
            except ValueError as error:
                raise ValueError(f"Sample {index} of the {name} dataset: {error}") from None
            num_start = dropped = 0
            if context and (excess := cut.num_excess(context, end)):
                num_start = cut.start.length(input_ids[:context].numpy())
                dropped = min(excess, context - num_start)
            yield SampleLengths(index, end, context, True, num_start, dropped, before)
            before = context
        if not spans:
            yield SampleLengths(index, len(labels), has_decision=False)


def row_sequences(row: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of what stands in a row: one sample, several packed ones, or branches."""
    input_ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels" if "labels" in row else "input_ids"))
    if BRANCHES in row:
        return unfold_branches(input_ids, labels, torch.tensor(row[BRANCHES]))
    if "seq_lengths" in row:
        lengths = np.asarray(row["seq_lengths"]).tolist()
        return list(zip(input_ids.split(lengths), labels.split(lengths), strict=True))
    return [(input_ids, labels)]


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

    def require(self, sample: SampleLengths, name: str) -> None:
        """Refuses a sample that does not, of the dataset of that name."""
        the_sample = f"Sample {sample.row} of the {name} dataset"
        if not sample.has_decision:
            raise ValueError(
                f"{the_sample} has no supervised label in its {sample.total} tokens, so it has no decision to train. "
                "Drop it, or check `completion_only_loss`, `assistant_only_loss` and the chat template."
            )
        if self.flattened and self.frozen and sample.context:
            raise ValueError(
                f"{the_sample} has a context of {sample.context} tokens, and `packing` and `padding_free` put samples "
                "into one row, where contexts cannot be told apart. Set both to False (decisions are short: little "
                "is padded), or train with `tier: 1`."
            )
        if self.max_length is not None and not self.flattened and sample.decision > self.max_length:
            raise ValueError(
                f"{the_sample} has a decision of {sample.decision} tokens, longer than "
                f"`max_length={self.max_length}`, and a decision is never cut. Raise `max_length` (None: no limit), "
                "or shorten the sample."
            )
        _require_room(sample, name, self.cut)
        kept = sample.total
        if self.cut.max_context_length is not None:
            kept = sample.decision + min(sample.context, self.cut.max_context_length)
        if self.cut.max_length is not None:
            kept = min(kept, self.cut.max_length)
        if self.max_positions is not None and kept > self.max_positions:
            raise ValueError(
                f"{the_sample} has {sample.total} tokens, {sample.context} of them context, and the model has "
                f"{self.max_positions} positions. Set `max_context_length` or `max_length`, or use a model with "
                "longer contexts."
            )


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

    def check_row(row: dict[str, Any], index: int) -> dict[str, Any]:
        for sample in measure_row(row, index, limits.cut, name):
            limits.require(sample, name)
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(check_row, with_indices=True)
    samples = []
    for sample in measure_samples(dataset, limits.cut, name):
        limits.require(sample, name)
        samples.append(sample)
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

    def limit(row: dict[str, Any], index: int) -> dict[str, Any]:
        columns = {key: row[key] for key in ("input_ids", "labels")}
        (sample,) = measure_row(columns, index, cut, name)
        if sample.decision <= max_length:
            _require_room(sample, name, cut)
        if sample.context or (cut.invocation and sample.has_decision):
            kept = slice(sample.start + sample.dropped, None)
        else:
            kept = slice(0, max_length)
        return {key: [*tokens[: sample.start], *tokens[kept]] for key, tokens in columns.items()}

    if isinstance(dataset, IterableDataset):
        return dataset.map(limit, with_indices=True)
    _say_cuts(list(measure_samples(dataset, cut, name)), name, cut)
    desc = f"Limiting {name} dataset to {max_length} tokens"
    return dataset.map(limit, with_indices=True, num_proc=num_proc, desc=desc)


def _say_cuts(samples: Sequence[SampleLengths], name: str, cut: Cut) -> None:
    """Logs how many contexts lose how much, if any do."""
    shortened = [sample for sample in samples if sample.dropped]
    if not shortened:
        return
    limits = {"max_context_length": cut.max_context_length, "max_length": cut.max_length}
    given = " and ".join(f"`{limit}={value}`" for limit, value in limits.items() if value is not None)
    num_kept = max(sample.start for sample in shortened)
    stays = f"up to {num_kept} tokens of their beginning and the latest stay" if num_kept else "the latest stay"
    num_shortened, num_rows = (len({sample.row for sample in each}) for each in (shortened, samples))
    logger.warning(
        f"{given}: of the {name} dataset, {num_shortened} of {num_rows} samples lose "
        f"{sum(sample.dropped for sample in samples)} of the {sum(sample.context for sample in samples)} tokens of "
        f"their contexts; {stays} (`keep_context_start`)."
    )


def _require_room(sample: SampleLengths, name: str, cut: Cut) -> None:
    """Refuses limits that leave no room for what stays of a context's beginning."""
    if not sample.start:
        return
    for field, beside in (("max_context_length", 0), ("max_length", sample.decision)):
        limit, needed = getattr(cut, field), sample.start + beside
        if limit is not None and needed > limit:
            with_decision = f", which with the decision are {needed}" if beside else ""
            raise ValueError(
                f"Sample {sample.row} of the {name} dataset begins with {sample.start} tokens that stay (its "
                f"beginning-of-sequence token, and what `keep_context_start` says){with_decision}, more than "
                f"`{field}={limit}`. Raise it, or keep less."
            )
