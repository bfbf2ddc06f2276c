# SPDX-License-Identifier: Apache-2.0
"""Samples with their instructions beside the same samples without, from a row of a dataset to a batch."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence

from frozen_peft.context import Cut, Decision, cut_batch
from frozen_peft.context.boundary import IGNORED_LABEL, DecisionMode
from frozen_peft.data.stripping import restore_instructions
from frozen_peft.utils.numpy_rows import numpy_rows

__all__ = [
    "TEACHER_COLUMNS",
    "TEACHER_IDS",
    "TEACHER_KEYS",
    "TEACHER_LABELS",
    "TEACHER_MASK",
    "TeacherCollator",
    "check_teacher",
    "prepare_with_teacher",
    "take_decisions",
]

# Columns of a prepared dataset: token ids and labels of the sample with its instructions.
TEACHER_IDS, TEACHER_LABELS = "teacher_input_ids", "teacher_labels"
TEACHER_COLUMNS = (TEACHER_IDS, TEACHER_LABELS)
# What they are in a batch, of shape (samples, tokens), with the mask of the padding.
TEACHER_MASK = "teacher_attention_mask"
TEACHER_KEYS = (*TEACHER_COLUMNS, TEACHER_MASK)
STRIPPED = "stripped"

Rows: TypeAlias = Dataset | IterableDataset


def prepare_with_teacher(dataset: Rows, prepare: Callable[[Rows], Rows], name: str, num_proc: int | None) -> Rows:
    """Prepares samples, and the same samples with their instructions in place.

    Args:
        dataset: Rows with the column `stripped`, an empty list where the teacher is to have no more than the student;
            or a dataset that is prepared already, with `TEACHER_COLUMNS`.
        prepare: TRL's preparation, which makes `input_ids` and `labels`.
        name: What to call the dataset in messages.
        num_proc: Processes to restore with.

    Returns:
        The prepared samples, with `TEACHER_COLUMNS`.

    Raises:
        ValueError: A row has no `stripped`, or one that does not fit it; the message names the row.
    """
    columns = _column_names(dataset)
    if "input_ids" in columns:
        _require_columns(columns, name)
        return prepare(dataset)
    if STRIPPED not in columns:
        raise ValueError(
            f"The {name} dataset has no column `{STRIPPED}` (found {', '.join(f'`{column}`' for column in columns)}), "
            "and `loss_type='distill'` puts the instructions back from it. Make it with `frozen-peft strip`, or set "
            "`loss_type: nll`."
        )
    teacher = prepare(_restored(dataset, name, num_proc)).select_columns(["input_ids", "labels"])
    teacher = teacher.rename_columns({"input_ids": TEACHER_IDS, "labels": TEACHER_LABELS})
    student = prepare(dataset)
    if isinstance(student, IterableDataset):
        # What is beside the tokens has no types that a stream could be joined by.
        student = student.select_columns(["input_ids", "labels"])
    return concatenate_datasets([student, teacher], axis=1)


def check_teacher(dataset: Rows, name: str, mode: DecisionMode, max_positions: int | None) -> Rows:
    """Checks every sample of a prepared dataset; of a stream, samples are checked as they come.

    Args:
        dataset: Has `input_ids`, `labels` and `TEACHER_COLUMNS`.
        name: What to call it in messages.
        mode: How samples are cut into decisions.
        max_positions: Positions that the model has; None where that is unknown.

    Returns:
        The dataset.

    Raises:
        ValueError: A decision is another one with its instructions, or the model has too few positions for them.
    """

    def check_row(row: dict[str, Any], index: int) -> dict[str, Any]:
        _require_columns(list(row), name)
        _require_same_decisions(row, f"Sample {index} of the {name} dataset", mode, max_positions)
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(check_row, with_indices=True)
    for index, row in enumerate(numpy_rows(dataset, ("input_ids", "labels", *TEACHER_COLUMNS))):
        check_row(row, index)
    return dataset


class TeacherCollator:
    """A collator that leaves a batch's samples to another one, and adds what they are with their instructions.

    Args:
        collator: Gets the samples without `TEACHER_COLUMNS`.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self._collator = collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        own = [{key: value for key, value in sample.items() if key not in TEACHER_COLUMNS} for sample in samples]
        ids, labels = ([torch.as_tensor(sample[name]) for sample in samples] for name in TEACHER_COLUMNS)
        return {
            **self._collator(own),
            TEACHER_IDS: pad_sequence(ids, batch_first=True),
            TEACHER_LABELS: pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
            TEACHER_MASK: pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }


def take_decisions(inputs: dict[str, Any], mode: DecisionMode) -> list[Decision]:
    """Takes the samples with their instructions out of a collated batch, and cuts them to decisions.

    The teacher has no horizon, and its context is never cut: the instructions may stand at its start.
    """
    if TEACHER_IDS not in inputs:
        return []
    input_ids, labels, mask = (inputs.pop(name) for name in TEACHER_KEYS)
    samples = cut_batch(input_ids, labels, mask, Cut(mode))
    return [decision for sample in samples for decision in sample]


def _restored(dataset: Rows, name: str, num_proc: int | None) -> Rows:
    """The rows with their instructions in place."""

    def restore(sample: dict[str, Any], index: int) -> dict[str, Any]:
        if sample[STRIPPED] is None:
            raise ValueError(
                f"Sample {index} of the {name} dataset has no `{STRIPPED}`, from which `loss_type='distill'` puts the "
                "instructions back. Strip it, or give it an empty list, which has the teacher see what the student "
                "sees."
            )
        try:
            return restore_instructions(sample)
        except ValueError as error:
            raise ValueError(f"Sample {index} of the {name} dataset: {error}") from error

    kwargs: dict[str, Any] = {"with_indices": True, "remove_columns": [STRIPPED]}
    if isinstance(dataset, IterableDataset):
        return dataset.map(restore, **kwargs)
    try:
        return dataset.map(restore, num_proc=num_proc, desc=f"Restoring instructions of {name} dataset", **kwargs)
    except TypeError as error:
        # A column of `datasets` has the type of its first rows.
        raise ValueError(
            f"The {name} dataset does not fit into one table with its instructions in place: a message that was "
            "stripped has fields that the messages of the first rows have not. Give all messages the same fields "
            f"before they are stripped. ({error})"
        ) from error


def _column_names(dataset: Rows) -> list[str]:
    return list(dataset.column_names or next(iter(dataset)))


def _require_columns(columns: list[str], name: str) -> None:
    if missing := [column for column in TEACHER_COLUMNS if column not in columns]:
        raise ValueError(
            f"The {name} dataset is tokenized and has no {' and no '.join(f'`{column}`' for column in missing)}: "
            "token ids and labels of each sample with its instructions in place, for the teacher of "
            "`loss_type='distill'`. Add them, or let the trainer prepare rows with the column `stripped`."
        )


def _require_same_decisions(
    row: Mapping[str, Any], sample: str, mode: DecisionMode, max_positions: int | None
) -> None:
    own_labels = "labels" if "labels" in row else "input_ids"
    own, theirs, ids = (np.asarray(row[column]) for column in (own_labels, TEACHER_LABELS, TEACHER_IDS))
    if len(theirs) != len(ids):
        raise ValueError(f"{sample} has {len(ids)} `{TEACHER_IDS}` and {len(theirs)} `{TEACHER_LABELS}`.")
    if (difference := _difference(own, theirs, mode)) is not None:
        raise ValueError(
            f"{sample} has another decision with its instructions in place, and `loss_type='distill'` compares "
            f"the same tokens: {difference}. Supervise the decision alone (prompt and completion, or "
            "`assistant_only_loss`), and let it begin where no token reaches across; a sample without context is "
            "cut at its end by `max_length`."
        )
    if max_positions is not None and len(ids) > max_positions:
        raise ValueError(
            f"{sample} has {len(ids)} tokens with its instructions in place, and the model has {max_positions} "
            "positions. Shorten it; the teacher's context is never cut."
        )


def _difference(own: np.ndarray, theirs: np.ndarray, mode: DecisionMode) -> str | None:
    """What tells two rows of labels apart; None where their supervised tokens are the same."""
    places, other_places = (np.flatnonzero(labels != IGNORED_LABEL) for labels in (own, theirs))
    if len(places) != len(other_places):
        return f"{len(places)} supervised tokens without instructions, {len(other_places)} with them"
    differ = np.flatnonzero(own[places] != theirs[other_places])
    if len(differ):
        first = differ[0]
        return f"supervised token {first} is {own[places[first]]} without instructions, " + (
            f"{theirs[other_places[first]]} with them"
        )
    if mode == "turns" and not np.array_equal(np.diff(places) == 1, np.diff(other_places) == 1):
        return "its turns begin at other tokens"
    # A first token is predicted by nothing.
    if len(places) and other_places[0] == 0 != places[0]:
        return "with them it begins with a supervised token, which nothing predicts"
    return None
