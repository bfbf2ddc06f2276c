# SPDX-License-Identifier: Apache-2.0
"""Marks: what says of a message, or of a stretch of its text, that it is an instruction."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from frozen_peft.data.conversation import Message

__all__ = ["DEFAULT_MARKS", "Marks", "Stretch", "merged", "tag_stretches", "text_between"]

# From and to, in characters of a text; the end is not part of it.
Stretch = tuple[int, int]

_TAG_NAME = re.compile(r"[^\W\d][\w.:-]*")


@dataclass(frozen=True)
class Marks:
    """What is an instruction. Several marks add up: what any of them marks is one.

    Attributes:
        tags: Names of tags: `instruction` marks `<instruction>...</instruction>`, tags included. A tag may have
            attributes, may nest, and is closed in the text in which it is opened. Case matters.
        fields: A message is one where it has such a field and it is true.
        roles: Every message of such a role is one.
        patterns: Regular expressions (of Python's `re`); what a match covers is one. A match of nothing marks nothing.
        predicates: A message is one where such a function of it says so.

    Raises:
        ValueError: No mark at all, or a tag's name or a pattern that cannot be one.
    """

    tags: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    predicates: tuple[Callable[[Message], bool], ...] = ()

    def __post_init__(self) -> None:
        if not (self.tags or self.fields or self.roles or self.patterns or self.predicates):
            raise ValueError("no marks: give a tag, a field, a role, a pattern or a predicate")
        for name in self.tags:
            if not _TAG_NAME.fullmatch(name):
                raise ValueError(f"tag {name!r}: give the name alone, letters, digits and any of `_.:-`")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern {pattern!r}: not a regular expression: {error}") from error

    @property
    def reach_into_text(self) -> bool:
        """Whether stretches of a text can be marked, and not whole messages only."""
        return bool(self.tags or self.patterns)

    def describe(self) -> str:
        """The marks in words, as a message says that there are none."""
        kinds = [
            ("tag", [f"<{name}>" for name in self.tags]),
            ("field", [f"`{name}`" for name in self.fields]),
            ("role", [f"`{name}`" for name in self.roles]),
            ("match of", [repr(pattern) for pattern in self.patterns]),
            ("message for the predicate", [f"`{_name(predicate)}`" for predicate in self.predicates]),
        ]
        return ", no ".join(f"{kind} {name}" for kind, names in kinds for name in names)

    def cover(self, message: Message, place: str) -> bool:
        """Says whether a whole message is marked.

        Args:
            message: The message, which a predicate must leave as it is.
            place: How an error names it.

        Raises:
            ValueError: A field is neither true nor false, or a predicate fails.
        """
        if message.get("role") in self.roles:
            return True
        for field in self.fields:
            value = message.get(field)
            if not (value is None or isinstance(value, bool)):
                raise ValueError(f"{place}: the mark `{field}` is {value!r}, expected true or false")
            if value:
                return True
        return any(_holds(predicate, message, place) for predicate in self.predicates)

    def stretches(self, text: str, place: str) -> list[Stretch]:
        """The marked stretches of a text, in order; stretches that overlap are one.

        Raises:
            ValueError: A tag is opened and not closed, or closed and not opened.
        """
        found = [stretch for name in self.tags for stretch in tag_stretches(text, name, place)]
        for pattern in self.patterns:
            found += [match.span() for match in re.finditer(pattern, text) if match.group()]
        return merged(found)


DEFAULT_MARKS = Marks(tags=("instruction",), fields=("instruction",))


def merged(stretches: Sequence[Stretch], *, touching: bool = False) -> list[Stretch]:
    """Stretches in order, those that overlap made one; those that only touch stay two, unless `touching`."""
    result: list[Stretch] = []
    for start, end in sorted(stretches):
        if result and (start < result[-1][1] or (touching and start == result[-1][1])):
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def text_between(text: str, stretches: Sequence[Stretch]) -> list[str]:
    """What a text has outside of stretches: before the first, between one and the next, and behind the last."""
    cuts = [0, *(place for stretch in stretches for place in stretch), len(text)]
    return [text[start:end] for start, end in zip(cuts[::2], cuts[1::2], strict=True)]


def tag_stretches(text: str, name: str, place: str) -> Iterator[Stretch]:
    """Yields the stretches from an outermost `<name>` to its `</name>`; `<name/>` is both.

    Raises:
        ValueError: A tag is opened and not closed, or closed and not opened; the message gives the character.
    """
    opened: list[int] = []
    for match in re.finditer(rf"<{re.escape(name)}(?:\s[^<>]*)?/?>|</{re.escape(name)}\s*>", text):
        tag = match.group()
        if tag.startswith("</"):
            if not opened:
                raise ValueError(f"{place}, character {match.start()}: {tag} without a <{name}> before it")
            start = opened.pop()
            if not opened:
                yield start, match.end()
        elif not tag.endswith("/>"):
            opened.append(match.start())
        elif not opened:
            yield match.span()
    if opened:
        raise ValueError(f"{place}, character {opened[-1]}: <{name}> is not closed before the text ends")


def _holds(predicate: Callable[[Message], bool], message: Message, place: str) -> bool:
    """The verdict of a function that is the user's own, so anything may be raised in it."""
    try:
        return bool(predicate(message))
    except Exception as error:
        raise ValueError(
            f"{place}: the predicate `{_name(predicate)}` failed: {type(error).__name__}: {error}"
        ) from error


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
