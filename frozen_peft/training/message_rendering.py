# SPDX-License-Identifier: Apache-2.0
"""What a chat template renders of one message, where it renders the messages before it in two ways.

A template may show a model that is about to write a message what it leaves out once the message is there: gpt-oss the
reasoning behind a call, whose answer follows; Qwen3 an empty block of reasoning in an assistant's message that another
one follows. What inference shows is then no beginning of the conversation with the message. The message's own part is
there all the same, behind the generation prompt:

1. What a change of the message changes first is in its own part, so that begins at the last generation prompt before.
2. That nothing of the message before it is in that part, a change of that message tells.
"""

import os
from collections.abc import Callable, Sequence

from frozen_peft.data.conversation import Message
from frozen_peft.data.traces import REASONING_FIELDS

__all__ = ["num_common", "rendered_behind_prompt"]

# Any text does; the kind of a message must stay, since templates go by it.
_CHANGE = "0"


def rendered_behind_prompt(
    render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message], index: int
) -> str | None:
    """A message as it is rendered behind the generation prompt.

    Args:
        render: Renders messages, with the generation prompt or without.
        messages: The conversation.
        index: Number of the message, above 0.

    Returns:
        Its text; None where it does not stand behind a generation prompt, or that cannot be told.
    """
    before, message = messages[:index], messages[index]
    shown = render(before, True)
    prompt = shown[num_common(render(before, False), shown) :]
    whole = render([*before, message], False)
    changed = render([*before, _changed(message)], False)
    start = whole.rfind(prompt, 0, num_common(whole, changed))
    if not prompt or start < 0:
        return None
    changed = render([*before[:-1], _changed(before[-1]), message], False)
    if changed == whole or not changed.endswith(whole[start:]):
        return None
    return whole[start + len(prompt) :]


def num_common(left: str, right: str) -> int:
    """Characters that two texts begin with alike."""
    # Character by character is how they are to be compared.
    return len(os.path.commonprefix([left, right]))  # noqa: RUF071


def _changed(message: Message) -> Message:
    """A message of the same kind with other texts."""
    other = dict(message)
    for name in (*REASONING_FIELDS, "content"):
        if isinstance(message.get(name), str) and message[name]:
            other[name] = _CHANGE + message[name]
    if isinstance(message.get("content"), list):
        other["content"] = [
            {**part, "text": _CHANGE + part["text"]} if isinstance(part.get("text"), str) else part
            for part in message["content"]
        ]
    if message.get("tool_calls"):
        other["tool_calls"] = [_changed_call(call) for call in message["tool_calls"]]
    return other


def _changed_call(call: Message) -> Message:
    if call.get("function") is None:
        return {**call, "name": _CHANGE + call["name"]}
    return {**call, "function": {**call["function"], "name": _CHANGE + call["function"]["name"]}}
