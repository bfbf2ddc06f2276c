# SPDX-License-Identifier: Apache-2.0
"""What a row must hold: text, messages, token ids; what makes it a sample to train on; what all rows must share.

Every check raises `ValueError` where something is wrong with a value, in words and by the name of its field.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from frozen_peft.data.json_text import JsonTextError, parse_json, require_exact

__all__ = [
    "TRAINED_COLUMNS",
    "RowChecks",
    "kind_of",
    "named",
    "no_training_column",
    "require_kind",
    "require_messages",
    "require_objects",
    "require_one_form",
    "require_value",
]

# The columns that TRL trains on, by dataset type; `text` can be renamed with `dataset_text_field`.
_TRAINING_COLUMNS = ("messages", "conversations", "prompt", "input_ids")
# What answers stand in, by what they are trained with (`method` of a recipe).
_ANSWERS = {"sft": ("completion",), "dpo": ("chosen", "rejected"), "kto": ("completion", "chosen", "rejected")}
# One number for each token.
_TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")
# What stands beside them and reaches the chat template, or the teacher.
_SIDE_COLUMNS = ("tools", "chat_template_kwargs", "stripped")
# All that what is trained depends on, without the column of plain text.
TRAINED_COLUMNS = (
    *_TRAINING_COLUMNS,
    "completion",
    "chosen",
    "rejected",
    "label",
    *_TOKEN_COLUMNS,
    *_SIDE_COLUMNS,
)
# What a column holds that is not text alone. A list is one of messages, or of token ids.
_KINDS = {
    "messages": ("a list",),
    "conversations": ("a list",),
    "prompt": ("text", "a list"),
    "completion": ("text", "a list"),
    "chosen": ("text", "a list"),
    "rejected": ("text", "a list"),
    "input_ids": ("a list",),
}


def kind_of(value: Any) -> str:
    """What a value is, as a message calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def named(names: Iterable[str]) -> str:
    """Names of columns, as a message lists them."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def require_kind(value: Any, name: str, *kinds: str) -> None:
    """A value is of one of these kinds, of those that `kind_of` knows."""
    found = kind_of(value)
    if found not in kinds:
        raise ValueError(f"`{name}` is {found}, expected {' or '.join(kinds)}")


def require_objects(value: Any, name: str) -> None:
    """A value is a list of objects."""
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is {kind_of(value)}, expected a list of objects")
    for index, item in enumerate(value):
        require_kind(item, f"{name}[{index}]", "an object")


def require_messages(messages: Sequence[Any], column: str) -> None:
    """The items of a list are messages."""
    for index, message in enumerate(messages):
        _require_message(message, f"{column}[{index}]")


def require_value(value: Any, column: str, *, empty_text: bool = False) -> None:
    """The value of a training column is text, messages or token ids, as the column has them.

    Args:
        value: The value.
        column: Its name.
        empty_text: Whether a text may be empty; a list may not: of no messages, TRL cannot tell what they are.
    """
    if not value and not (empty_text and value == ""):
        raise ValueError(f"`{column}` is {'null' if value is None else 'empty'}")
    require_kind(value, column, *_KINDS.get(column, ("text",)))
    if column == "input_ids":
        _require_numbers(value, column)
    elif isinstance(value, list):
        require_messages(value, column)


def require_one_form(row: dict[str, Any], columns: Sequence[str]) -> None:
    """Columns are all text or all lists; what TRL would take another row for depends on chance."""
    for column in columns[1:]:
        if isinstance(row[column], str) != isinstance(row[columns[0]], str):
            kinds = [f"`{name}` is {kind_of(row[name])}" for name in (columns[0], column)]
            raise ValueError(f"{' and '.join(kinds)}; they have the same form, text or a list of messages")


def no_training_column(columns: Iterable[str], text_field: str) -> str:
    """Says that none of the columns is one to train on."""
    return f"none of the columns {named((*_TRAINING_COLUMNS, text_field))}; found {named(columns)}"


class RowChecks:
    """Checks the rows of a dataset, one after the other.

    Args:
        text_field: Column that holds the text of plain language modelling samples.
        method: What they are trained with: `sft`, `dpo` or `kto`.
        prompts_alone: Whether rows may be prompts without a `completion`, since the model writes it.

    Attributes:
        columns: The columns that training depends on.
    """

    def __init__(self, text_field: str, method: str = "sft", *, prompts_alone: bool = False):
        self._text_field, self._method, self._prompts_alone = text_field, method, prompts_alone
        self.columns = (*TRAINED_COLUMNS, text_field)
        self._first_row: tuple[str, dict[str, str]] | None = None

    def require_sample(self, row: Any, place: str) -> None:
        """A row is a sample, and like the first one.

        Raises:
            ValueError: It is not; the message does not name the place of this row, which a later one may.
        """
        if not isinstance(row, dict):
            raise ValueError(f"a sample is a JSON object, got {kind_of(row)}")
        for column, value in row.items():
            # Only what is trained on has to be a number: such a margin may be none.
            if column in self.columns or not isinstance(value, float):
                require_exact(value, column, rounding=column in self.columns)
        if self._method == "sft":
            self._require_trainable(row)
        else:
            self._require_preference(row)
        self._require_alike(row, place)

    def _require_preference(self, row: dict[str, Any]) -> None:
        """A pair of answers, or for `kto` also one with its label; the prompt may stand in both answers."""
        answers = [name for name in _ANSWERS[self._method] if name in row]
        if answers == ["completion"] and self._method == "kto":
            if "prompt" not in row:
                raise ValueError("there is a `completion` but no `prompt`")
            if not isinstance(row.get("label"), bool):
                raise ValueError("`label` is true or false: whether the `completion` is wanted")
        elif answers != ["chosen", "rejected"]:
            wanted = "`chosen` and `rejected`" + (", or `completion` and `label`" if self._method == "kto" else "")
            raise ValueError(f"`method: {self._method}` trains {wanted}; found {named(row)}")
        trained = [name for name in ("prompt", *answers) if name in row]
        for column in trained:
            require_value(row[column], column)
        require_one_form(row, trained)
        _require_side_columns(row)

    def _require_trainable(self, row: dict[str, Any]) -> None:
        text_field, present = self._text_field, {*_TRAINING_COLUMNS} & row.keys()
        if not present and text_field not in row:
            raise ValueError(no_training_column(row, text_field))
        if self._prompts_alone:
            row = {name: value for name, value in row.items() if name != "completion"}
        elif "prompt" in row and row["prompt"] is not None and "completion" not in row:
            pairs = "; pairs of `chosen` and `rejected` are trained with `method: dpo`" if "chosen" in row else ""
            raise ValueError(f"there is a `prompt` but no `completion`{pairs}")
        if "completion" in row and "prompt" not in row and text_field != "completion":
            raise ValueError("there is a `completion` but no `prompt`")
        trained = [name for name in (*_TRAINING_COLUMNS, "completion") if name in row and name != text_field]
        if text_field in row and not present:
            trained.append(text_field)
        for column in trained:
            # An empty prompt is a sample without context.
            require_value(row[column], column, empty_text=column == "prompt")
        require_one_form(row, [name for name in ("prompt", "completion", "messages") if name in row])
        # Which of two texts TRL would train depends on the order of its own cases.
        if isinstance(row.get("completion"), str) and text_field in row and text_field != "completion":
            raise ValueError(
                f"there is `{text_field}` beside `prompt` and `completion` of text, and only one of them can be "
                "trained; remove or rename the others"
            )
        if "input_ids" in row:
            _require_token_columns(row)
        _require_side_columns(row)

    def _require_alike(self, row: dict[str, Any], place: str) -> None:
        """TRL looks at the first row to say what all of them are."""
        answers = () if self._prompts_alone else _ANSWERS[self._method]
        required = (*_TRAINING_COLUMNS, *answers, *_TOKEN_COLUMNS, self._text_field)
        kinds = {name: kind_of(row[name]) for name in required if name in row}
        if self._first_row is None:
            self._first_row = (place, kinds)
        first_place, first = self._first_row
        for column in required:
            found, expected = (row_kinds.get(column, "missing") for row_kinds in (kinds, first))
            if found != expected:
                raise ValueError(f"`{column}` is {found}, but {expected} in {first_place}; all rows have one form")


def _require_message(message: Any, place: str) -> None:
    role, content = ("from", "value") if place.startswith("conversations") else ("role", "content")
    if not isinstance(message, dict):
        raise ValueError(f"`{place}` is {kind_of(message)}, a message is an object with `{role}` and `{content}`")
    if message.get(role) is None:
        raise ValueError(f"`{place}` has no `{role}`")
    require_kind(message[role], f"{place}.{role}", "text")
    body, calls = message.get(content), message.get("tool_calls")
    if body is None and calls is None:
        raise ValueError(f"`{place}` has no `{content}`")
    if body is not None:
        _require_content(body, f"{place}.{content}")
    if calls is not None:
        require_objects(calls, f"{place}.tool_calls")


def _require_content(content: Any, name: str) -> None:
    require_kind(content, name, "text", "a list")
    if isinstance(content, list):
        require_objects(content, name)
        for index, part in enumerate(content):
            require_kind(part.get("text", ""), f"{name}[{index}].text", "text")


def _require_token_columns(row: dict[str, Any]) -> None:
    for column in _TOKEN_COLUMNS:
        if column in row:
            _require_numbers(row[column], column)
            if len(row[column]) != len(row["input_ids"]):
                raise ValueError(f"`{column}` has {len(row[column])} entries, for {len(row['input_ids'])} `input_ids`")


def _require_numbers(value: Any, column: str) -> None:
    require_kind(value, column, "a list")
    for index, number in enumerate(value):
        if type(number) is not int or (number < 0 and column == "input_ids") or abs(number) >= 2**31:
            shown = repr(number) if type(number) in (int, float) else kind_of(number)
            raise ValueError(f"`{column}[{index}]` is {shown}, expected a token's number")


def _require_side_columns(row: dict[str, Any]) -> None:
    kwargs, tools = row.get("chat_template_kwargs"), row.get("tools")
    if kwargs is not None:
        require_kind(kwargs, "chat_template_kwargs", "an object")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools.encode())
        except JsonTextError as error:
            raise ValueError(f"`tools` is text that is not JSON: {error}") from error
        require_exact(tools, "tools")
    if tools is not None:
        require_objects(tools, "tools")
