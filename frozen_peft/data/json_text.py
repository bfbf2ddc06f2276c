# SPDX-License-Identifier: Apache-2.0
"""JSON as it is written: nothing of it is guessed, rounded or dropped without a word.

Numbers count by their value: `1.50` and `1.5` are the same, `1` and `1.0` are not.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

__all__ = [
    "BYTE_ORDER_MARK",
    "InexactNumber",
    "JsonTextError",
    "has_half_pair",
    "numbered_lines",
    "parse_array",
    "parse_json",
    "require_exact",
]

# What editors of some systems put before a text in UTF-8, and no part of it.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Levels of lists and objects in a value; what reads and writes them downstream recurses.
MAX_DEPTH = 200
# What the `Json` type of `datasets` reads back.
SMALLEST, LARGEST = -(2**63), 2**64 - 1


class InexactNumber(float):
    """A number that a float does not hold as it is written: rounded, or none at all.

    Attributes:
        text: How it is written.
    """

    def __init__(self, text: str):
        self.text = text


class JsonTextError(ValueError):
    """What is wrong with a text that should be JSON.

    Attributes:
        line: Line of the text, counted from 1.
        column: Where in the line, counted from 1; None where that is not known.
        reason: The problem.
    """

    def __init__(self, reason: str, line: int = 1, column: int | None = None):
        super().__init__(reason if column is None else f"column {column}: {reason}")
        self.line, self.column, self.reason = line, column, reason


def parse_json(text: bytes) -> Any:
    """Reads one JSON value, in UTF-8.

    Returns:
        The value, in which an `InexactNumber` stands for each number that a float does not hold.

    Raises:
        JsonTextError: It is not JSON, not UTF-8, nested too deeply, or an object has a key twice.
    """
    decoded = _decoded(text)
    try:
        return _DECODER.decode(decoded)
    except (ValueError, RecursionError) as error:
        raise _named(error) from error


def numbered_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1; a byte order mark is no part of the first."""
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if text.strip():
            yield number, text


def parse_array(text: bytes) -> Iterator[Any]:
    """Reads the values of one JSON array, in UTF-8, one after the other.

    Yields:
        The values, as of `parse_json`.

    Raises:
        JsonTextError: As `parse_json`.
    """
    decoded = _decoded(text.removeprefix(BYTE_ORDER_MARK))
    opening = _after_space(decoded, 0)
    assert decoded[opening] == "["
    place = _after_space(decoded, opening + 1)
    line, counted = 1, 0
    is_last = decoded[place : place + 1] == "]"
    try:
        while not is_last:
            line, counted = line + decoded.count("\n", counted, place), place
            value, place = _DECODER.raw_decode(decoded, place)
            yield value
            place = _after_space(decoded, place)
            is_last = decoded[place : place + 1] == "]"
            if not is_last:
                if decoded[place : place + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", decoded, place)
                place = _after_space(decoded, place + 1)
        place = _after_space(decoded, place + 1)
        if place < len(decoded):
            raise json.JSONDecodeError("Extra data", decoded, place)
    except (ValueError, RecursionError) as error:
        named = _named(error)
        # Of what has no place of its own, the value that it is in.
        raise JsonTextError(named.reason, max(named.line, line), named.column) from error


def require_exact(value: Any, name: str, *, rounding: bool = True) -> None:
    """Refuses a value of which something would not be trained as it is written.

    Args:
        value: What was read.
        name: What to call it, such as `messages`.
        rounding: Whether a number that is only rounded counts.

    Raises:
        ValueError: Something would not; the message names the field and the reason.
    """
    stack = [(name, value, 0)]
    while stack:
        path, item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"`{name}` is nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, dict):
            for key in item:
                if has_half_pair(key):
                    raise ValueError(f"`{path}` has a key with {_HALF_PAIR}: {key!a}")
            stack += [(f"{path}.{key}", inner, depth + 1) for key, inner in reversed(item.items())]
        elif isinstance(item, list):
            stack += [(f"{path}[{index}]", item[index], depth + 1) for index in reversed(range(len(item)))]
        elif isinstance(item, str):
            if has_half_pair(item):
                raise ValueError(f"`{path}` has {_HALF_PAIR}, which no text in UTF-8 can hold; remove it")
        elif problem := _number_problem(item, rounding):
            raise ValueError(f"`{path}` is {problem}; write it as text")


_HALF_PAIR = "half a surrogate pair"


def has_half_pair(text: str) -> bool:
    """Whether a text has half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def _number_problem(value: Any, rounding: bool) -> str | None:
    if isinstance(value, InexactNumber):
        if not math.isfinite(value):
            return f"{value.text}, which is no finite number"
        return f"{value.text}, which a 64-bit float holds as {float(value)!r}" if rounding else None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value}, which is no finite number"
    if isinstance(value, int) and not SMALLEST <= value <= LARGEST:
        return "an integer of more than 64 bits"
    return None


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonTextError(f"not UTF-8: {error.reason}", 1 + text.count(b"\n", 0, error.start)) from error


def _named(error: ValueError | RecursionError) -> JsonTextError:
    if isinstance(error, JsonTextError):
        return error
    if isinstance(error, json.JSONDecodeError):
        return JsonTextError(f"not JSON: {error.msg}", error.lineno, error.colno)
    if isinstance(error, RecursionError):
        return JsonTextError("not JSON: nested too deeply")
    # Python's limit on the digits of an integer.
    return JsonTextError(f"not JSON that can be read: {error}")


def _after_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _number(text: str) -> float:
    value = float(text)
    if repr(value) == text:
        return value
    try:
        exact = math.isfinite(value) and Decimal(repr(value)) == Decimal(text)
    except InvalidOperation:
        exact = False
    return value if exact else InexactNumber(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in made if keys.count(key) > 1)
        raise JsonTextError(f"the key `{twice}` comes twice in one object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=InexactNumber)
