# SPDX-License-Identifier: Apache-2.0
"""The files that variants draw from: unrelated messages, and paraphrases."""

from pathlib import Path
from typing import Any

from frozen_peft.data.conversation import Message, messages_problem
from frozen_peft.data.paraphrases import Paraphrases
from frozen_peft.data.rows import read_rows

__all__ = ["read_paraphrases", "read_units"]


def read_units(path: Path) -> list[list[Message]]:
    """Reads unrelated units: rows `{"role": ..., "content": ...}`, or `{"messages": [...]}` for an exchange.

    Raises:
        ValueError: A row is neither, an exchange does not begin with a user, or there are no rows.
        FileNotFoundError: There is no such file.
    """
    units = [row.values.get("messages", [row.values]) for row in read_rows(path, _unit_problem)]
    if not units:
        raise ValueError(f"{path}: the file has no messages")
    return units


def read_paraphrases(path: Path) -> Paraphrases:
    """Reads rows `{"text": ..., "alternatives": [...]}`; rows of the same text add up.

    Raises:
        ValueError: A row is malformed, or there are none.
        FileNotFoundError: There is no such file.
    """
    alternatives: dict[str, list[str]] = {}
    for row in read_rows(path, _paraphrase_problem):
        alternatives.setdefault(row.values["text"], []).extend(row.values["alternatives"])
    if not alternatives:
        raise ValueError(f"{path}: the file has no paraphrases")
    return Paraphrases(alternatives)


def _unit_problem(values: dict[str, Any]) -> str | None:
    if "messages" not in values:
        return messages_problem([values], "message")
    messages = values["messages"]
    if not isinstance(messages, list):
        return "`messages` is not a list of messages"
    problem = messages_problem(messages, "messages")
    if problem is None and len(messages) > 1 and messages[0]["role"] != "user":
        return f"an exchange begins with a user's message, this one with role {messages[0]['role']!r}"
    return problem


def _paraphrase_problem(values: dict[str, Any]) -> str | None:
    text, alternatives = values.get("text"), values.get("alternatives")
    if not isinstance(text, str):
        return "a paraphrase has a `text`"
    if not isinstance(alternatives, list) or not all(isinstance(other, str) for other in alternatives):
        return "a paraphrase has `alternatives`, a list of texts"
    try:
        Paraphrases({text: alternatives})
    except ValueError as error:
        return str(error)
    return None
