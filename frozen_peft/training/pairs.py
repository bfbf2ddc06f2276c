# SPDX-License-Identifier: Apache-2.0
"""Prepared datasets of prompts and answers: cut to length, and checked before training so that a message names a row.

A prepared row has `prompt_ids` and the token ids of one or more answers, as TRL leaves it: where a prompt's tokens do
not begin those of prompt and answer, TRL ends it where the first answer's sequence leaves it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tqdm import tqdm
from transformers.utils import logging

from frozen_peft.context.boundary import TAIL, Cut, decision_start
from frozen_peft.utils.numpy_rows import numpy_rows

__all__ = ["ANSWERS", "PROMPT", "AnswerLimits", "check_answers", "limit_prompts", "longest_answer", "require_columns"]

logger = logging.get_logger(__name__)

PROMPT = "prompt_ids"
# Columns of answers, of whichever trainer.
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")


@dataclass(frozen=True)
class AnswerLimits:
    """What prompts and answers must keep to.

    Attributes:
        answers: Columns of the answers' token ids, those that must differ first.
        differ: Whether the first two must.
        max_positions: Positions that the model has; None: not known.
        max_length: The trainer's.
        cut: Where a prompt and its answer are cut.
    """

    answers: tuple[str, ...]
    differ: bool
    max_positions: int | None = None
    max_length: int | None = None
    cut: Cut = TAIL

    def columns(self, row: Mapping[str, Any]) -> list[str]:
        """The answers that a row has."""
        return [name for name in self.answers if name in row]

    def context_length(self, row: Mapping[str, Any], name: str) -> int:
        """Context tokens of an answer.

        Raises:
            ValueError: See `decision_start`.
        """
        tokens = torch.from_numpy(np.concatenate([row[PROMPT], row[name]]))
        return decision_start(tokens, len(row[PROMPT]), len(tokens), self.cut.invocation)

    def require(self, row: Mapping[str, Any], index: int, dataset: str) -> None:
        """Refuses a row that does not keep to them.

        Raises:
            ValueError: Names it, what was found and what to do.
        """
        the_sample, names = f"Sample {index} of the {dataset} dataset", self.columns(row)
        if not len(row[PROMPT]):
            raise ValueError(
                f"{the_sample} has an empty prompt: the first tokens of its answers would be predicted by nothing. "
                "Drop it, or write the prompt that the answers were given to."
            )
        for name in names:
            if not len(row[name]):
                raise ValueError(f"{the_sample} has an empty answer (`{name}`). Drop it.")
        if self.differ and np.array_equal(row[names[0]], row[names[1]]):
            raise ValueError(
                f"{the_sample} has the same tokens for `chosen` and for `rejected`, so there is nothing to prefer. "
                "Drop it, or check how its answers were made."
            )
        self._require_room(row, names, the_sample)

    def _require_room(self, row: Mapping[str, Any], names: Sequence[str], the_sample: str) -> None:
        for name in names:
            try:
                context = self.context_length(row, name)
            except ValueError as error:
                raise ValueError(f"{the_sample}: {error}") from None
            total = len(row[PROMPT]) + len(row[name])
            if self.max_length is not None and total > self.max_length:
                raise ValueError(
                    f"{the_sample} has an answer of {total - context} tokens (`{name}`), its last prompt token "
                    f"included, and a context of {context} that cannot be cut further, more than "
                    f"`max_length={self.max_length}`; an answer is never cut. Raise `max_length` (None: no limit), or "
                    "shorten the answer."
                )
            kept = total
            if self.cut.max_context_length is not None:
                kept = total - context + min(context, self.cut.max_context_length)
            if self.max_positions is not None and kept > self.max_positions:
                raise ValueError(
                    f"{the_sample} has {total} tokens (prompt and `{name}`), {context} of them context, and the model "
                    f"has {self.max_positions} positions. Set `max_context_length` or `max_length`, or use a model "
                    "with longer contexts."
                )


def require_columns(row: Mapping[str, Any], names: Sequence[str], dataset: str) -> None:
    """Refuses a tokenized row that lacks something.

    Raises:
        ValueError: Names what is missing.
    """
    if missing := [name for name in names if name not in row]:
        raise ValueError(
            f"The {dataset} dataset has `{PROMPT}`, so its rows count as tokenized, and lacks "
            f"{', '.join(f'`{name}`' for name in missing)}. Add what is missing, or give it text or messages."
        )


def check_answers(dataset: Dataset | IterableDataset, name: str, limits: AnswerLimits) -> Dataset | IterableDataset:
    """Checks every row of a prepared dataset; of a stream, rows are checked as they come.

    Args:
        dataset: A prepared dataset.
        name: What to call it in messages, such as `train`.
        limits: What its rows must keep to.

    Returns:
        The dataset.

    Raises:
        ValueError: See `AnswerLimits.require`.
    """

    def check_row(row: dict[str, Any], index: int) -> dict[str, Any]:
        limits.require(row, index, name)
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(check_row, with_indices=True)
    rows = numpy_rows(dataset, (PROMPT, *limits.columns(dict.fromkeys(dataset.column_names))))
    for index, row in enumerate(tqdm(rows, f"Measuring {name} dataset", len(dataset), unit=" rows", delay=2)):
        limits.require(row, index, name)
    return dataset


def longest_answer(dataset: Dataset, cut: Cut = TAIL) -> tuple[int, int]:
    """Most context tokens, and most decision tokens, of the rows of a prepared dataset as they are cut."""
    context = decision = 0
    for row in numpy_rows(dataset, (PROMPT, *ANSWERS)):
        before = max(len(row[PROMPT]) - max(len(cut.invocation), 1), 0)
        own = max(len(row[name]) for name in ANSWERS if name in row) + len(row[PROMPT]) - before
        context, decision = max(context, before), max(decision, own)
    return context, decision


def limit_prompts(
    dataset: Dataset | IterableDataset, name: str, num_proc: int | None, limits: AnswerLimits
) -> Dataset | IterableDataset:
    """Cuts prompts so that each with its longest answer has `max_length` tokens, at most as far as its context goes.

    Args:
        dataset: A prepared dataset.
        name: What to call it in messages.
        num_proc: Processes to cut with.
        limits: What its rows must keep to.
    """
    if limits.max_length is None:
        return dataset
    limit = _limited(limits, limits.max_length)
    if isinstance(dataset, IterableDataset):
        return dataset.map(limit)
    before = sum(map(len, dataset[PROMPT]))
    dataset = dataset.map(limit, num_proc=num_proc, desc=f"Limiting {name} dataset to {limits.max_length} tokens")
    if dropped := before - sum(map(len, dataset[PROMPT])):
        logger.warning(
            f"`max_length={limits.max_length}`: prompts of the {name} dataset lose {dropped} of {before} tokens, the "
            "oldest but for their beginning (`keep_context_start`)."
        )
    return dataset


def _limited(limits: AnswerLimits, max_length: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def limit(row: dict[str, Any]) -> dict[str, Any]:
        prompt, names = row[PROMPT], limits.columns(row)
        excess = len(prompt) + max((len(row[name]) for name in names), default=0) - max_length
        # What is wrong with a row is said where rows are checked.
        if excess <= 0 or not prompt:
            return {PROMPT: prompt}
        boundary = max(len(prompt) - max(len(limits.cut.invocation), 1), 0)
        context = limits.cut.kept(np.array(prompt[:boundary], dtype=np.int64), excess)
        return {PROMPT: [*context.tolist(), *prompt[boundary:]]}

    return limit
