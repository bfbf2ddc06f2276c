# SPDX-License-Identifier: Apache-2.0
"""The forms of a sample row, and where its context ends and its decision begins.

| row | context | decision |
| --- | --- | --- |
| `{"prompt": [messages], "completion": [messages]}` | the prompt | the completion |
| `{"prompt": text, "completion": text}` | the prompt | the completion |
| `{"messages": [messages]}` | everything before the last message | the last message, the assistant's |
| `{"prompt": messages or text}`, such as a probe | the prompt | none |

Other columns are nobody's business here and stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "Context",
    "Message",
    "Split",
    "message_texts",
    "messages_problem",
    "sample_problem",
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
    problem = sample_problem(sample)
    if problem:
        raise ValueError(problem)
    if sample.get("prompt") is not None:
        return Split("prompt", sample["prompt"], sample.get("completion"))
    return Split("messages", sample["messages"][:-1], sample["messages"][-1:])


def with_context(sample: dict[str, Any], context: Context) -> dict[str, Any]:
    """A copy of a row with another context; the decision and all other columns are the row's own objects."""
    split = split_sample(sample)
    if split.column == "prompt":
        return {**sample, "prompt": context}
    assert isinstance(context, list)
    assert isinstance(split.decision, list)
    return {**sample, "messages": [*context, *split.decision]}


def sample_problem(sample: dict[str, Any]) -> str | None:
    """Says what keeps a row from being a sample, None where nothing does."""
    if sample.get("prompt") is not None:
        return _prompt_problem(sample)
    if sample.get("messages") is None:
        columns = ", ".join(f"`{name}`" for name in sample) or "none"
        return f"a sample has the column `prompt` or `messages`; found {columns}"
    messages = sample["messages"]
    if not isinstance(messages, list):
        return f"`messages` is {_kind(messages)}, expected a list of messages"
    problem = messages_problem(messages, "messages")
    if problem:
        return problem
    if messages[-1]["role"] != "assistant":
        return f"`messages` ends with role {messages[-1]['role']!r}; the decision is its last message, an assistant's"
    if len(messages) == 1:
        return "`messages` has nothing before the decision"
    return None


def message_texts(message: Message) -> list[tuple[int, str]]:
    """The texts of a message: `(-1, content)`, or `(number, text)` for each text part where content is parts."""
    content = message.get("content")
    if isinstance(content, str):
        return [(-1, content)]
    return [(number, part["text"]) for number, part in enumerate(content or []) if isinstance(part.get("text"), str)]


def _prompt_problem(sample: dict[str, Any]) -> str | None:
    prompt, completion = sample["prompt"], sample.get("completion")
    if not isinstance(prompt, (str, list)):
        return f"`prompt` is {_kind(prompt)}, expected text or a list of messages"
    if completion is not None and type(completion) is not type(prompt):
        return f"`prompt` is {_kind(prompt)} and `completion` is {_kind(completion)}; they have the same form"
    for name, value in (("prompt", prompt), ("completion", completion)):
        problem = messages_problem(value, name) if isinstance(value, list) else None
        if problem:
            return problem
    return None


def messages_problem(messages: Sequence[Any], column: str) -> str | None:
    """Says what keeps a list from being a conversation's messages, None where nothing does."""
    if not messages:
        return f"`{column}` has no messages"
    for number, message in enumerate(messages):
        place = f"`{column}[{number}]`"
        if not isinstance(message, dict):
            return f"{place} is {_kind(message)}, a message is an object with `role` and `content`"
        if not isinstance(message.get("role"), str):
            return f"{place} has no `role`"
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            return f"{place} has no `content`"
        if content is not None and not isinstance(content, (str, list)):
            return f"{place} has {_kind(content)} as `content`, expected text or a list of parts"
        if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
            return f"{place} has a part that is not an object in its `content`"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
