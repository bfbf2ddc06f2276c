# SPDX-License-Identifier: Apache-2.0
"""Probes: questions to a model of the form "which of these two decisions, in this context?".

Conditions say which context a decision is scored in:

- `given`: the probe's prompt.
- `instructed`: the prompt with the instructions that were stripped from it put back.
- `shuffled`: the prompt of another probe of its kind. Which one is drawn as a derangement of the distinct prompts, so
  none keeps its own.
- `empty`: nothing but what the chat template puts before every assistant message, and the beginning of the sequence
  where the tokenizer marks it.

A decision keeps its tokens in the last two, whatever it stands behind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from frozen_peft.data.conversation import Message, require_sample
from frozen_peft.data.row_checks import named, require_kind, require_objects
from frozen_peft.data.rows import Row, read_rows
from frozen_peft.data.traces import require_message

__all__ = ["CONDITIONS", "KINDS", "Condition", "Probe", "ProbeKind", "read_probes"]

ProbeKind = Literal["target", "control"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
Condition = Literal["given", "instructed", "shuffled", "empty"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


@dataclass(frozen=True)
class Probe:
    """A context, and two decisions of which one is preferred.

    Attributes:
        prompt: The context: messages, or text.
        preferred: The decision that is wanted: text, which after messages is the content of the assistant's next one;
            or that message, with reasoning or calls of tools.
        rejected: One that is not.
        kind: `"target"`: what training is to bring about. `"control"`: what it must leave as it is.
        expected: What greedy decoding is to give, where that is known.
        stripped: The instructions that were stripped from the prompt, as `strip_instructions` keeps them.
        id: A name of its own among the probes of a file.
        place: Where it came from, as messages name it.
        values: The row's fields, of which `tools` and `chat_template_kwargs` go to the chat template.
    """

    prompt: list[dict[str, Any]] | str
    preferred: str | Message
    rejected: str | Message
    kind: ProbeKind = "target"
    expected: str | Message | None = None
    stripped: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""
    place: str = "probe"
    values: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_row(cls, values: dict[str, Any], place: str = "probe", default_id: str = "") -> "Probe":
        """Makes a probe of a row.

        Args:
            values: The row's fields.
            place: Where it is, for messages.
            default_id: Its name where the row has no `id`.

        Raises:
            ValueError: A field is missing or is not what it should be.
        """
        _require_fields(values)
        return cls(
            prompt=values["prompt"],
            preferred=values["preferred"],
            rejected=values["rejected"],
            kind=cast(ProbeKind, values.get("kind") or "target"),
            expected=values.get("expected"),
            stripped=values.get("stripped") or [],
            id=values.get("id") or default_id,
            place=place,
            values=values,
        )


def read_probes(path: Path, on_bad: Callable[[str], None] | None = None) -> list[Probe]:
    """Reads the probes of a JSON Lines file.

    Args:
        path: The file.
        on_bad: Called with the message of a bad line, which is then left out. Without it a bad line is an error.

    Returns:
        The probes in their order; one without an `id` is called by its line.

    Raises:
        ValueError: A line is bad, two probes have the same `id`, or there are no probes.
        FileNotFoundError: There is no such file.
    """
    places: dict[str, str] = {}

    def made(row: Row) -> Probe:
        probe = Probe.from_row(row.values, row.place, default_id=f"line {row.line}")
        if probe.id in places:
            raise ValueError(f"`id` {probe.id!r} is that of {places[probe.id]}; give each probe its own")
        places[probe.id] = row.place
        return probe

    empty = "no probes to score; a line is {'prompt': ..., 'preferred': ..., 'rejected': ...}"
    return list(read_rows(path, made, on_bad, empty=empty))


def _require_fields(values: dict[str, Any]) -> None:
    """Refuses a row that is no probe."""
    missing = [name for name in ("prompt", "preferred", "rejected") if values.get(name) is None]
    if missing:
        raise ValueError(f"a probe needs {named(missing)}; found {named(values)}")
    for name in ("preferred", "rejected", "expected"):
        value = values.get(name)
        if value is not None:
            require_kind(value, name, "text", "an object")
        if isinstance(value, dict):
            _require_answer(value, name, values["prompt"])
        elif value == "":
            raise ValueError(f"`{name}` is empty: a decision has at least one token")
    if values.get("id") is not None:
        require_kind(values["id"], "id", "text")
    if values["preferred"] == values["rejected"]:
        shown = str(values["preferred"])[:40]
        raise ValueError(f"`preferred` and `rejected` are equal ({shown!r}): there is nothing to prefer")
    if values.get("kind") not in (None, *KINDS):
        raise ValueError(f"`kind` is one of {', '.join(KINDS)}; got {values['kind']!r}")
    if values.get("stripped"):
        require_objects(values["stripped"], "stripped")
    # No messages are a decision without context, which is no sample to strip but one to score.
    if values["prompt"] != []:
        require_sample({"prompt": values["prompt"]})


def _require_answer(message: dict[str, Any], name: str, prompt: Any) -> None:
    """Refuses a decision that is no message of an assistant behind messages."""
    if isinstance(prompt, str):
        raise ValueError(f"`{name}` is a message, and `prompt` is text; they have the same form")
    if message.get("role") != "assistant":
        raise ValueError(f"`{name}.role` is {message.get('role')!r}; a decision is an assistant's")
    require_message(message, name)
