# SPDX-License-Identifier: Apache-2.0
"""Conversations for `decision_mode="turns"`: rendered turn by turn, looked at for what is left out, and collated."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging
from trl.trainer.utils import remove_none_values

from frozen_peft.context.branches import BRANCHES, fold_branches
from frozen_peft.data.conversation import Message
from frozen_peft.data.traces import reasoning_of
from frozen_peft.training.turn_rendering import TurnRenderer, template_options

__all__ = ["ROW_NUMBER", "BranchCollator", "as_written", "render_turns", "require_branches", "say_dropped_reasoning"]

logger = logging.get_logger(__name__)

_MESSAGE_COLUMNS = ("messages", "prompt", "completion")
# Rows of a dataset that are looked at for reasoning.
_NUM_LOOKED_AT = 100
# Column of the number that a row has in its dataset, where a part of that counts from 0.
ROW_NUMBER = "row_number"


def render_turns(
    dataset: Dataset | IterableDataset,
    renderer: TurnRenderer,
    name: str,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    """Conversations as rows of branches; a dataset that is one of those already stays as it is.

    Args:
        dataset: Rows of messages.
        renderer: Renders them.
        name: What to call the dataset in messages.
        num_proc: Processes to render with.

    Returns:
        The dataset with `input_ids`, `labels` and `branches`.

    Raises:
        ValueError: A row cannot be rendered; the message names row and message.
    """
    columns: Iterable[str] = dataset.column_names or next(iter(dataset))
    if BRANCHES in columns:
        return dataset
    if "input_ids" in columns:
        raise ValueError(
            f"The {name} dataset is tokenized, and `turn_contexts='inference'` renders messages. Give it rows of "
            "`messages`, or set `turn_contexts='training'`."
        )

    is_typed = dataset.features is not None

    def render(row: dict[str, Any], index: int) -> dict[str, Any]:
        index = row.get(ROW_NUMBER, index)
        try:
            turns = renderer.turns(as_written(row) if is_typed else row)
        except ValueError as error:
            raise ValueError(f"Sample {index} of the {name} dataset: {error}") from error
        return fold_branches([turn.input_ids for turn in turns], [turn.first for turn in turns])

    if isinstance(dataset, IterableDataset):
        return dataset.map(render, with_indices=True)
    return dataset.map(render, with_indices=True, num_proc=num_proc, desc=f"Rendering turns of {name} dataset")


def require_branches(dataset: Dataset | IterableDataset, name: str, *, wanted: bool) -> None:
    """Refuses a dataset that was prepared with another `turn_contexts`.

    Args:
        dataset: A prepared dataset.
        name: What to call it in messages.
        wanted: Whether its rows are to be branches.
    """
    columns = dataset.column_names
    if columns is not None and (BRANCHES in columns) != wanted:
        found, other = ("no", "inference") if wanted else ("the", "training")
        raise ValueError(
            f"The {name} dataset has {found} column `{BRANCHES}`, and `turn_contexts={other!r}`. Prepare it anew from "
            "its messages, or set `turn_contexts` to what it was prepared with."
        )


def say_dropped_reasoning(
    rows: Iterable[Mapping[str, Any]], processing_class: Any, chat_template: str | None, name: str
) -> None:
    """Warns where a conversation that is rendered once leaves out reasoning that it has.

    Args:
        rows: Rows of a dataset, of which the first are looked at.
        processing_class: What renders them.
        chat_template: What it renders them by; None: its own.
        name: What to call the dataset in messages.
    """
    for index, row in enumerate(islice(rows, _NUM_LOOKED_AT)):
        messages = [message for column in _MESSAGE_COLUMNS for message in _objects(row.get(column))]
        reasons = [(place, found) for place, message in enumerate(messages) if (found := reasoning_of(message))]
        if not reasons:
            continue
        try:
            text = processing_class.apply_chat_template(
                messages, tokenize=False, chat_template=chat_template, **template_options(row)
            )
        except Exception:
            # TRL renders it next, and says what is wrong with it.
            return
        for place, (field, reasoning) in reasons:
            if reasoning not in text:
                logger.warning(
                    f"The chat template leaves the `{field}` of message {place} out of sample {index} of the {name} "
                    "dataset, so that turn trains without it; it may do so with others. "
                    "`turn_contexts='inference'` trains each turn with its own reasoning, behind what inference shows."
                )
                return


class BranchCollator:
    """A collator that leaves a batch's rows to another one, and adds which branches they hold.

    Args:
        collator: Gets the rows without `branches`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self._collator = collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [torch.as_tensor(sample[BRANCHES]) for sample in samples]
        own = [{key: value for key, value in sample.items() if key != BRANCHES} for sample in samples]
        return {**self._collator(own), BRANCHES: pad_sequence(rows, batch_first=True)}


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a table with types fills in: it gives every object the keys that any row's has."""
    written: dict[str, Any] = remove_none_values(row)
    for column in _MESSAGE_COLUMNS:
        for message, given in zip(_objects(written.get(column)), _objects(row.get(column)), strict=False):
            if "content" in given:
                # A template may ask whether it is null.
                message.setdefault("content", None)
    return written


def _objects(messages: Any) -> list[Message]:
    return [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
