# SPDX-License-Identifier: Apache-2.0
"""What a row must be to be a sample of one of TRL's dataset types, and what all rows must share."""

from collections.abc import Iterable
from typing import Any

from frozen_peft.data.json_text import JsonTextError, inexactness, parse_json

__all__ = ["TRAINED_COLUMNS", "RowChecks", "kind_of", "no_training_column"]

# The columns that TRL trains on, by dataset type; `text` can be renamed with `dataset_text_field`.
_TRAINING_COLUMNS = ("messages", "conversations", "prompt", "input_ids")
# One number for each token.
_TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")
# What stands beside them and reaches the chat template, or the teacher.
_SIDE_COLUMNS = ("tools", "chat_template_kwargs", "stripped")
# All that what is trained depends on, without the column of plain text.
TRAINED_COLUMNS = (*_TRAINING_COLUMNS, "completion", *_TOKEN_COLUMNS, *_SIDE_COLUMNS)
# The value of a conversation's column is a list of messages with these keys.
_MESSAGE_KEYS = {"messages": "role", "prompt": "role", "completion": "role", "conversations": "from"}


class RowChecks:
    """Checks the rows of a dataset, one after the other.

    Args:
        text_field: Column that holds the text of plain language modelling samples.
    """

    def __init__(self, text_field: str = "text"):
        self._text_field = text_field
        self._forms: dict[str, tuple[str, str]] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that training depends on."""
        return (*TRAINED_COLUMNS, self._text_field)

    def problem(self, row: Any, place: str) -> str | None:
        """Says what keeps a row from being a sample, or is unlike the first row's; None where nothing is."""
        if not isinstance(row, dict):
            return f"a sample is a JSON object, got {kind_of(row)}"
        return self._inexactness(row) or self._problem(row) or self._difference(row, place)

    def _inexactness(self, row: dict[str, Any]) -> str | None:
        for column, value in row.items():
            problem = inexactness(value, column, rounding=column in self.columns)
            # Only what is trained on has to be a number: such a margin may be none.
            if problem and (column in self.columns or not isinstance(value, float)):
                return problem
        return None

    def _problem(self, row: dict[str, Any]) -> str | None:
        text_field, present = self._text_field, {*_TRAINING_COLUMNS} & row.keys()
        if not present and text_field not in row:
            return no_training_column(row, text_field)
        if "prompt" in row and row["prompt"] is not None and "completion" not in row:
            return "there is a `prompt` but no `completion`"
        if "completion" in row and "prompt" not in row and text_field != "completion":
            return "there is a `completion` but no `prompt`"
        for column in (text_field, *_TRAINING_COLUMNS, "completion"):
            if column in row and not (column == text_field and present):
                problem = _value_problem(row[column], column)
                if problem:
                    return problem
        return self._forms_problem(row) or _token_problem(row) or _side_problem(row)

    def _forms_problem(self, row: dict[str, Any]) -> str | None:
        """What TRL would take one row's columns for depends on chance, or on the order of its own cases."""
        found = [column for column in ("prompt", "completion", "messages") if column in row]
        for column in found[1:]:
            if isinstance(row[column], str) != isinstance(row[found[0]], str):
                kinds = [f"`{name}` is {kind_of(row[name])}" for name in (found[0], column)]
                return f"{' and '.join(kinds)}; they have the same form, text or a list of messages"
        if isinstance(row.get("completion"), str) and self._text_field in row and self._text_field != "completion":
            return (
                f"there is `{self._text_field}` beside `prompt` and `completion` of text, and only one of them can be "
                "trained; remove or rename the others"
            )
        return None

    def _difference(self, row: dict[str, Any], place: str) -> str | None:
        """TRL looks at the first row to say what all of them are."""
        required = (*_TRAINING_COLUMNS, "completion", *_TOKEN_COLUMNS, self._text_field)
        found = {name: (kind_of(row[name]), place) for name in required if name in row}
        if self._forms is None:
            self._forms = found
        for column in required:
            kind, first = (found.get(column), self._forms.get(column))
            if (kind is None) != (first is None):
                has, lacks = (place, self._place) if first is None else (self._place, place)
                return f"`{column}` is there in {has} and missing in {lacks}; all rows have one form"
            if kind is not None and first is not None and kind[0] != first[0]:
                return f"`{column}` is {kind[0]}, but {first[0]} in {first[1]}"
        return None

    @property
    def _place(self) -> str:
        assert self._forms
        return next(iter(self._forms.values()))[1]


def no_training_column(columns: Iterable[str], text_field: str) -> str:
    """Says that none of the columns is one to train on."""
    expected = ", ".join(f"`{name}`" for name in (*_TRAINING_COLUMNS, text_field))
    found = ", ".join(f"`{name}`" for name in columns) or "none"
    return f"none of the columns {expected}; found {found}"


def kind_of(value: Any) -> str:
    """What a value is, as a message calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _value_problem(value: Any, column: str) -> str | None:
    """What keeps the value of a training column from being text, messages or token ids."""
    # An empty text is a sample without context; of no messages, TRL cannot tell what they are.
    if not value and not (column == "prompt" and value == ""):
        return f"`{column}` is {'null' if value is None else 'empty'}"
    if column in _MESSAGE_KEYS and isinstance(value, list):
        return _messages_problem(value, column)
    if column == "input_ids":
        return _numbers_problem(value, column)
    if not isinstance(value, str) or column in ("messages", "conversations"):
        return f"`{column}` is {kind_of(value)}"
    return None


def _messages_problem(messages: list[Any], column: str) -> str | None:
    key = _MESSAGE_KEYS[column]
    content = "value" if key == "from" else "content"
    for number, message in enumerate(messages):
        place = f"`{column}[{number}]`"
        if not isinstance(message, dict):
            return f"{place} is {kind_of(message)}, a message is an object with `{key}` and `{content}`"
        if not isinstance(message.get(key), str):
            return f"{place} has no `{key}`" if message.get(key) is None else f"{place} has a `{key}` that is no text"
        calls = message.get("tool_calls")
        if message.get(content) is None and calls is None:
            return f"{place} has no `{content}`"
        problem = _content_problem(message.get(content)) or _calls_problem(calls)
        if problem:
            return f"{place} has {problem}"
    return None


def _content_problem(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return None
    if not isinstance(content, list):
        return f"{kind_of(content)} as its content, expected text or a list of parts"
    for part in content:
        if not isinstance(part, dict):
            return f"{kind_of(part)} as a part of its content, expected an object"
        if not isinstance(part.get("text", ""), str):
            return f"{kind_of(part['text'])} as `text` in a part of its content"
    return None


def _calls_problem(calls: Any) -> str | None:
    if calls is None:
        return None
    if not isinstance(calls, list):
        return f"{kind_of(calls)} as `tool_calls`, expected a list"
    return next(
        (f"{kind_of(call)} in `tool_calls`, expected an object" for call in calls if type(call) is not dict), None
    )


def _token_problem(row: dict[str, Any]) -> str | None:
    if "input_ids" not in row:
        return None
    for column in _TOKEN_COLUMNS:
        if column in row:
            problem = _numbers_problem(row[column], column)
            if problem:
                return problem
            if len(row[column]) != len(row["input_ids"]):
                return f"`{column}` has {len(row[column])} entries, for {len(row['input_ids'])} `input_ids`"
    return None


def _numbers_problem(value: Any, column: str) -> str | None:
    if not isinstance(value, list):
        return f"`{column}` is {kind_of(value)}, expected a list of integers"
    for index, number in enumerate(value):
        if type(number) is not int or (number < 0 and column == "input_ids") or abs(number) >= 2**31:
            return f"`{column}[{index}]` is {_shown(number)}, expected a token's number"
    return None


def _side_problem(row: dict[str, Any]) -> str | None:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        return f"`chat_template_kwargs` is {kind_of(kwargs)}, expected an object"
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools.encode())
        except JsonTextError as error:
            return f"`tools` is text that is not JSON: {error}"
        if problem := inexactness(tools, "tools"):
            return problem
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return "`tools` is not a list of objects"
    return None


def _shown(value: Any) -> str:
    return f"{value!r}" if isinstance(value, int | float) and not isinstance(value, bool) else kind_of(value)
