# SPDX-License-Identifier: Apache-2.0
"""Conversations whose turns train one by one: which of them do, and what is wrong with one, by its message.

An assistant's message trains unless it says `"train": false` or `"weight": 0`. Of a prompt and its completion, only
those of the completion do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frozen_peft.data.conversation import Message
from frozen_peft.data.row_checks import kind_of, named, require_kind, require_objects

__all__ = ["REASONING_FIELDS", "Trace", "read_trace", "reasoning_of", "require_message"]

# What messages keep their reasoning under, by the chat template that reads it.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# What says of a message whether it trains; no chat template gets it.
_CHOICES = ("train", "weight")
_ASSISTANT, _TOOL = "assistant", "tool"


@dataclass(frozen=True)
class Trace:
    """A conversation.

    Attributes:
        messages: As a chat template gets them.
        places: Where in its row each stands.
        trained: Numbers of the messages that train.
    """

    messages: list[Message]
    places: list[str]
    trained: list[int]


def read_trace(row: Mapping[str, Any]) -> Trace:
    """The conversation of a row of `messages`, or of `prompt` and `completion` that are messages.

    Raises:
        ValueError: It has none, or a message is wrong; the message names it.
    """
    columns = ("prompt", "completion") if row.get("prompt") is not None else ("messages",)
    messages: list[Message] = []
    places: list[str] = []
    trained = []
    for column in columns:
        found = row.get(column)
        if not isinstance(found, list):
            raise ValueError(
                f"`{column}` is {kind_of(found)}, and `turn_contexts='inference'` renders a list of messages (found "
                f"the columns {named(row)}). Train other rows with `turn_contexts='training'`."
            )
        for index, message in enumerate(found):
            place = f"{column}[{index}]"
            require_message(message, place)
            if _trains(message, place, default=column != "prompt"):
                trained.append(len(messages))
            messages.append(_without_absent(message))
            places.append(place)
    _require_order(messages, places, trained)
    if not trained:
        raise ValueError("no message of an assistant trains. Drop the row, or let one of its messages train.")
    return Trace(messages, places, trained)


def reasoning_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The field of a message's reasoning and its text; None where it has none."""
    for name in REASONING_FIELDS:
        text = message.get(name)
        if isinstance(text, str) and text.strip():
            return name, text.strip()
    return None


def _without_absent(message: Message) -> Message:
    """A message without what a table fills in for fields that it does not have, and without what is no template's."""
    return {
        name: value
        for name, value in message.items()
        if name not in _CHOICES and (value is not None or name == "content")
    }


def _trains(message: Message, place: str, *, default: bool) -> bool:
    given = {name: message[name] for name in _CHOICES if message.get(name) is not None}
    for name, value in given.items():
        if value not in (0, 1) or (name == "train" and not isinstance(value, bool)):
            expected = "true or false" if name == "train" else "0 or 1"
            raise ValueError(f"`{place}.{name}` is {value!r}, expected {expected}")
    if len({bool(value) for value in given.values()}) > 1:
        raise ValueError(f"`{place}` says `train` and `weight`, and they differ. Leave one of them out.")
    is_assistant = message["role"] == _ASSISTANT
    chosen = bool(next(iter(given.values()))) if given else default and is_assistant
    if chosen and not is_assistant:
        raise ValueError(f"`{place}` is to train, and its role is {message['role']!r}: only an assistant's does.")
    return chosen


def require_message(message: Any, place: str) -> None:
    """Refuses what is no message, or one whose reasoning or calls are wrong; errors call it by its place."""
    if not isinstance(message, dict):
        raise ValueError(f"`{place}` is {kind_of(message)}, a message is an object with `role` and `content`")
    require_kind(message.get("role"), f"{place}.role", "text")
    require_kind(message.get("content"), f"{place}.content", "text", "a list", "null")
    for name in REASONING_FIELDS:
        require_kind(message.get(name), f"{place}.{name}", "text", "null")
    calls = message.get("tool_calls")
    if calls is None:
        if message.get("content") is None and reasoning_of(message) is None:
            raise ValueError(f"`{place}` has neither `content` nor `tool_calls`")
        return
    require_objects(calls, f"{place}.tool_calls")
    if calls and message["role"] != _ASSISTANT:
        raise ValueError(f"`{place}.tool_calls`: a call is an assistant's, and the role is {message['role']!r}")
    for number, call in enumerate(calls):
        _require_call(call, f"{place}.tool_calls[{number}]")


def _require_call(call: dict[str, Any], place: str) -> None:
    function = call if call.get("function") is None else call["function"]
    require_kind(function, f"{place}.function", "an object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"`{place}` is a call without a `name`")
    if function.get("arguments") is None:
        raise ValueError(
            f"`{place}` is a call without `arguments`; of a function that takes none they are an object, {{}}"
        )
    require_kind(function["arguments"], f"{place}.arguments", "an object", "text")


def _require_order(messages: Sequence[Message], places: Sequence[str], trained: Sequence[int]) -> None:
    """Every result of a tool follows on a call of its own, and what trains follows on something."""
    calls: list[Any] = []
    for message, place in zip(messages, places, strict=True):
        role = message["role"]
        if role == _ASSISTANT:
            calls += [call.get("id") for call in message.get("tool_calls", ())]
        elif role == _TOOL:
            if not calls:
                raise ValueError(f"`{place}` is the result of a tool, and no call before it is without one")
            given = message.get("tool_call_id")
            if given is not None and given not in calls and None not in calls:
                raise ValueError(
                    f"`{place}` is the result of the call {given!r}, and those before it without a result are "
                    f"{', '.join(map(repr, calls))}"
                )
            calls.remove(given if given in calls else calls[0])
        elif role == "user":
            calls = []
    if trained and trained[0] == 0:
        raise ValueError(
            f"`{places[0]}` is to train, and nothing stands before it that a model could be shown. Begin with another "
            'message, or say `"train": false`.'
        )
