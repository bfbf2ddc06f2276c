# SPDX-License-Identifier: Apache-2.0
"""The forms of a sample row, and where its context ends and its decision begins.

| row | context | decision |
| --- | --- | --- |
| `{"prompt": [messages], "completion": [messages]}` | the prompt | the completion |
| `{"prompt": text, "completion": text}` | the prompt | the completion |
| `{"messages": [messages]}` | everything before the last message | the last message, the assistant's |
| `{"prompt": messages or text}`, such as a probe | the prompt | none |
| `{"prompt": ..., "chosen": ..., "rejected": ...}`, a pair | the prompt | the chosen answer |

Other columns are nobody's business here and stay as they are.
"""

from dataclasses import dataclass
from typing import Any, Literal

from frozen_peft.data.row_checks import named, require_one_form, require_value

__all__ = [
    "Context",
    "Message",
    "Split",
    "message_texts",
    "require_sample",
    "split_sample",
    "with_context",
]

Message = dict[str, Any]
Context = list[Message] | str


@dataclass(frozen=True)
class Split:
    """A sample cut in two.

    Attributes:
        column: Where the context stands in the row.
        context: Messages or text.
        decision: Messages or text, as the context is; None in a row that has a prompt alone.
    """

    column: Literal["prompt", "messages"]
    context: Context
    decision: Context | None


def split_sample(sample: dict[str, Any]) -> Split:
    """Cuts a row of any form into context and decision; both are the row's own objects, not copies.

    Raises:
        ValueError: The row has no such form; the message names the column.
    """
    require_sample(sample)
    if sample.get("prompt") is not None:
        decision = sample.get("completion")
        return Split("prompt", sample["prompt"], sample.get("chosen") if decision is None else decision)
    return Split("messages", sample["messages"][:-1], sample["messages"][-1:])


def with_context(sample: dict[str, Any], context: Context) -> dict[str, Any]:
    """A copy of a row with another context; the decision and all other columns are the row's own objects."""
    split = split_sample(sample)
    if split.column == "prompt":
        return {**sample, "prompt": context}
    assert isinstance(context, list)
    assert isinstance(split.decision, list)
    return {**sample, "messages": [*context, *split.decision]}


def require_sample(sample: dict[str, Any]) -> None:
    """Refuses a row of none of these forms.

    Raises:
        ValueError: It is no sample; the message names the column.
    """
    if sample.get("prompt") is not None:
        # A probe has a `rejected` of its own kind.
        answers = ("completion", *(("chosen", "rejected") if "chosen" in sample else ()))
        columns = ["prompt", *(name for name in answers if sample.get(name) is not None)]
    elif sample.get("messages") is not None:
        columns = ["messages"]
    else:
        raise ValueError(f"a sample has the column `prompt` or `messages`; found {named(sample)}")
    for name in columns:
        require_value(sample[name], name, empty_text=True)
    require_one_form(sample, columns)
    if columns == ["messages"]:
        *context, decision = sample["messages"]
        if decision["role"] != "assistant":
            raise ValueError(
                f"`messages` ends with role {decision['role']!r}; the decision is its last message, an assistant's"
            )
        if not context:
            raise ValueError("`messages` has nothing before the decision")


def message_texts(message: Message) -> list[tuple[int, str]]:
    """The texts of a message: `(-1, content)`, or `(number, text)` for each text part where content is parts."""
    content = message.get("content")
    if isinstance(content, str):
        return [(-1, content)]
    return [(number, part["text"]) for number, part in enumerate(content or []) if isinstance(part.get("text"), str)]
