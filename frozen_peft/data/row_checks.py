# SPDX-License-Identifier: Apache-2.0
"""What a row must hold: text, messages, token ids; what makes it a sample to train on; what all rows must share.

Every check says what is wrong with a value in words, by the name of its field, or None where nothing is.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from frozen_peft.data.json_text import JsonTextError, inexactness, parse_json

__all__ = [
    "TRAINED_COLUMNS",
    "RowChecks",
    "form_problem",
    "kind_of",
    "kind_problem",
    "messages_problem",
    "named",
    "no_training_column",
    "objects_problem",
    "value_problem",
]

# The columns that TRL trains on, by dataset type; `text` can be renamed with `dataset_text_field`.
_TRAINING_COLUMNS = ("messages", "conversations", "prompt", "input_ids")
# One number for each token.
_TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")
# What stands beside them and reaches the chat template, or the teacher.
_SIDE_COLUMNS = ("tools", "chat_template_kwargs", "stripped")
# All that what is trained depends on, without the column of plain text.
TRAINED_COLUMNS = (*_TRAINING_COLUMNS, "completion", *_TOKEN_COLUMNS, *_SIDE_COLUMNS)
# What a column holds that is not text alone. A list is one of messages, or of token ids.
_KINDS = {
    "messages": ("a list",),
    "conversations": ("a list",),
    "prompt": ("text", "a list"),
    "completion": ("text", "a list"),
    "input_ids": ("a list",),
}


def kind_of(value: Any) -> str:
    """What a value is, as a message calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def named(names: Iterable[str]) -> str:
    """Names of columns, as a message lists them."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def kind_problem(value: Any, name: str, *kinds: str) -> str | None:
    """What keeps a value from being of one of these kinds, of those that `kind_of` knows."""
    found = kind_of(value)
    return None if found in kinds else f"`{name}` is {found}, expected {' or '.join(kinds)}"


def objects_problem(value: Any, name: str) -> str | None:
    """What keeps a value from being a list of objects."""
    if not isinstance(value, list):
        return f"`{name}` is {kind_of(value)}, expected a list of objects"
    return _first(kind_problem(item, f"{name}[{index}]", "an object") for index, item in enumerate(value))


def messages_problem(messages: Sequence[Any], column: str) -> str | None:
    """What keeps the items of a list from being messages."""
    return _first(_message_problem(message, f"{column}[{index}]") for index, message in enumerate(messages))


def value_problem(value: Any, column: str, *, empty_text: bool = False) -> str | None:
    """What keeps the value of a training column from being text, messages or token ids, as the column has them.

    Args:
        value: The value.
        column: Its name.
        empty_text: Whether a text may be empty; a list may not: of no messages, TRL cannot tell what they are.
    """
    if not value and not (empty_text and value == ""):
        return f"`{column}` is {'null' if value is None else 'empty'}"
    if problem := kind_problem(value, column, *_KINDS.get(column, ("text",))):
        return problem
    if column == "input_ids":
        return _numbers_problem(value, column)
    return messages_problem(value, column) if isinstance(value, list) else None


def form_problem(row: dict[str, Any], columns: Sequence[str]) -> str | None:
    """What keeps columns from having one form; what TRL would take such a row for depends on chance."""
    for column in columns[1:]:
        if isinstance(row[column], str) != isinstance(row[columns[0]], str):
            kinds = [f"`{name}` is {kind_of(row[name])}" for name in (columns[0], column)]
            return f"{' and '.join(kinds)}; they have the same form, text or a list of messages"
    return None


def no_training_column(columns: Iterable[str], text_field: str) -> str:
    """Says that none of the columns is one to train on."""
    return f"none of the columns {named((*_TRAINING_COLUMNS, text_field))}; found {named(columns)}"


class RowChecks:
    """Checks the rows of a dataset, one after the other.

    Args:
        text_field: Column that holds the text of plain language modelling samples.
    """

    def __init__(self, text_field: str = "text"):
        self._text_field = text_field
        self._first_row: tuple[str, dict[str, str]] | None = None

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
        trained = [name for name in (*_TRAINING_COLUMNS, "completion") if name in row and name != text_field]
        if text_field in row and not present:
            trained.append(text_field)
        return (
            # An empty prompt is a sample without context.
            _first(value_problem(row[column], column, empty_text=column == "prompt") for column in trained)
            or form_problem(row, [name for name in ("prompt", "completion", "messages") if name in row])
            or self._ambiguity(row)
            or _token_problem(row)
            or _side_problem(row)
        )

    def _ambiguity(self, row: dict[str, Any]) -> str | None:
        """Which of two texts TRL would train depends on the order of its own cases."""
        if isinstance(row.get("completion"), str) and self._text_field in row and self._text_field != "completion":
            return (
                f"there is `{self._text_field}` beside `prompt` and `completion` of text, and only one of them can be "
                "trained; remove or rename the others"
            )
        return None

    def _difference(self, row: dict[str, Any], place: str) -> str | None:
        """TRL looks at the first row to say what all of them are."""
        required = (*_TRAINING_COLUMNS, "completion", *_TOKEN_COLUMNS, self._text_field)
        kinds = {name: kind_of(row[name]) for name in required if name in row}
        if self._first_row is None:
            self._first_row = (place, kinds)
        first_place, first = self._first_row
        for column in required:
            if (column in kinds) != (column in first):
                has, lacks = (place, first_place) if column in kinds else (first_place, place)
                return f"`{column}` is there in {has} and missing in {lacks}; all rows have one form"
            if column in kinds and kinds[column] != first[column]:
                return f"`{column}` is {kinds[column]}, but {first[column]} in {first_place}"
        return None


def _first(problems: Iterable[str | None]) -> str | None:
    return next(filter(None, problems), None)


def _message_problem(message: Any, place: str) -> str | None:
    role, content = ("from", "value") if place.startswith("conversations") else ("role", "content")
    if not isinstance(message, dict):
        return f"`{place}` is {kind_of(message)}, a message is an object with `{role}` and `{content}`"
    if message.get(role) is None:
        return f"`{place}` has no `{role}`"
    if problem := kind_problem(message[role], f"{place}.{role}", "text"):
        return problem
    body, calls = message.get(content), message.get("tool_calls")
    if body is None and calls is None:
        return f"`{place}` has no `{content}`"
    problem = _content_problem(body, f"{place}.{content}") if body is not None else None
    return problem or (objects_problem(calls, f"{place}.tool_calls") if calls is not None else None)


def _content_problem(content: Any, name: str) -> str | None:
    if isinstance(content, str):
        return None
    if problem := kind_problem(content, name, "text", "a list"):
        return problem
    return objects_problem(content, name) or _first(
        kind_problem(part.get("text", ""), f"{name}[{index}].text", "text") for index, part in enumerate(content)
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
    if problem := kind_problem(value, column, "a list"):
        return problem
    for index, number in enumerate(value):
        if type(number) is not int or (number < 0 and column == "input_ids") or abs(number) >= 2**31:
            return f"`{column}[{index}]` is {_shown(number)}, expected a token's number"
    return None


def _side_problem(row: dict[str, Any]) -> str | None:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and (problem := kind_problem(kwargs, "chat_template_kwargs", "an object")):
        return problem
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools.encode())
        except JsonTextError as error:
            return f"`tools` is text that is not JSON: {error}"
        if problem := inexactness(tools, "tools"):
            return problem
    return None if tools is None else objects_problem(tools, "tools")


def _shown(value: Any) -> str:
    return f"{value!r}" if isinstance(value, int | float) and not isinstance(value, bool) else kind_of(value)
