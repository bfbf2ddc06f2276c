# SPDX-License-Identifier: Apache-2.0
"""Rows for `distill_on_policy=1`: prompts, of which the model writes every answer.

A prompt is what inference shows a model that is about to write, whether or not the row has a decision behind it. In
the prepared dataset one supervised token stands where the answer begins, so that a row is cut, measured and grouped
like any other; it is never trained.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from trl import maybe_convert_to_chatml

from frozen_peft.context import IGNORED_LABEL, Cut
from frozen_peft.data.conversation import split_sample
from frozen_peft.distillation import TEACHER_COLUMNS, num_prompt_tokens, require_room
from frozen_peft.training.turn_contexts import ROW_NUMBER, as_written
from frozen_peft.training.turn_rendering import TurnRenderer, template_options
from frozen_peft.utils.numpy_rows import numpy_rows

__all__ = ["check_prompts", "prepare_prompts", "require_completions"]

Rows: TypeAlias = Dataset | IterableDataset


def prepare_prompts(dataset: Rows, renderer: TurnRenderer, stop_token: int, name: str, num_proc: int | None) -> Rows:
    """Prompts as a trainer's preparation makes samples.

    Args:
        dataset: Rows of any form that `data.conversation` lists, a decision or none in them; or tokenized ones, with
            `labels` of -100 alone where a row is a prompt.
        renderer: Renders messages, and makes tokens of text.
        stop_token: Stands where an answer is to come.
        name: What to call the dataset in messages.
        num_proc: Processes to render with.

    Returns:
        The dataset with `input_ids` and `labels`.

    Raises:
        ValueError: A row is no prompt, or is not rendered; the message names it.
    """
    columns = list(dataset.column_names or next(iter(dataset)))
    is_tokenized = "input_ids" in columns
    is_typed = dataset.features is not None

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        if is_tokenized:
            return _with_places(row, stop_token)
        try:
            tokens = _prompt_tokens(as_written(row) if is_typed else row, renderer)
        except ValueError as error:
            raise ValueError(f"Sample {row.get(ROW_NUMBER, index)} of the {name} dataset: {error}") from error
        return {"input_ids": [*tokens, stop_token], "labels": [IGNORED_LABEL] * len(tokens) + [stop_token]}

    if is_tokenized and ("labels" not in columns or (isinstance(dataset, Dataset) and _all_supervised(dataset))):
        return dataset
    kwargs: dict[str, Any] = {"with_indices": True}
    if isinstance(dataset, IterableDataset):
        return dataset.map(prepare, **kwargs)
    return dataset.map(prepare, num_proc=num_proc, desc=f"Tokenizing prompts of {name} dataset", **kwargs)


def require_completions(dataset: Rows, share: float, name: str) -> None:
    """Refuses prompts alone where the model does not write every answer.

    Raises:
        ValueError: There are no decisions to distill beside the model's own answers.
    """
    columns = list(dataset.column_names or next(iter(dataset)))
    if "prompt" in columns and "completion" not in columns and "input_ids" not in columns:
        raise ValueError(
            f"The {name} dataset has a column `prompt` and no `completion`, and with `distill_on_policy={share}` a "
            "share of its samples is distilled as written. Set `distill_on_policy: 1`, or give each a `completion`."
        )


def check_prompts(dataset: Dataset, model: torch.nn.Module, cut: Cut, max_completion_length: int, name: str) -> None:
    """Checks of every prompt of a prepared dataset that an answer has room behind it.

    Args:
        dataset: Has `input_ids`, `labels` and `TEACHER_COLUMNS`.
        model: The student.
        cut: Where samples are cut.
        max_completion_length: Tokens of the longest answer.
        name: What to call the dataset in messages.

    Raises:
        ValueError: A prompt is empty, or leaves no room; the message names the sample.
    """
    for index, row in enumerate(numpy_rows(dataset, ("input_ids", "labels", *TEACHER_COLUMNS))):
        sample = f"Sample {index} of the {name} dataset"
        for column, whose in (("labels", sample), (TEACHER_COLUMNS[1], f"{sample}, with its instructions in place,")):
            num_tokens = num_prompt_tokens(torch.tensor(row[column if column in row else "input_ids"]))
            if not num_tokens:
                raise ValueError(
                    f"{whose} has nothing before its first supervised token, and with `distill_on_policy` the model "
                    "writes what comes behind that. Give it a prompt; of tokenized rows, `labels` of -100."
                )
            if column == "labels" and cut.max_context_length is not None:
                num_tokens = min(num_tokens, cut.max_context_length + max(len(cut.invocation), 1))
            require_room(model, num_tokens, max_completion_length, whose)


def _prompt_tokens(row: dict[str, Any], renderer: TurnRenderer) -> list[int]:
    row = maybe_convert_to_chatml(row)
    split = split_sample(row)
    if isinstance(split.context, str):
        tokens = renderer.text_tokens(split.context)
    else:
        tokens = renderer.prompt_tokens(split.context, f"`{split.column}`", template_options(row))
    if not tokens:
        raise ValueError(f"`{split.column}` has no tokens, and the model is to answer it")
    return tokens


def _with_places(row: Mapping[str, Any], stop_token: int) -> dict[str, Any]:
    """A tokenized row with a place for the answer, for student and teacher, where none is supervised."""
    changed: dict[str, Any] = {}
    for ids, labels in (("input_ids", "labels"), TEACHER_COLUMNS):
        if labels in row and all(label == IGNORED_LABEL for label in row[labels]):
            changed |= {ids: [*row[ids], stop_token], labels: [*row[labels], stop_token]}
    return changed


def _all_supervised(dataset: Dataset) -> bool:
    return all(bool((np.asarray(row["labels"]) != IGNORED_LABEL).any()) for row in numpy_rows(dataset, ("labels",)))
