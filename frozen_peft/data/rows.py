# SPDX-License-Identifier: Apache-2.0
"""JSON Lines files of samples and probes: read with the place of each mistake."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frozen_peft.data import BYTE_ORDER_MARK, JsonTextError, parse_json

__all__ = ["Row", "dump_row", "read_rows"]

# Says what is wrong with a row, None where nothing is.
Check = Callable[[dict[str, Any]], str | None]


@dataclass(frozen=True)
class Row:
    """One object of a file.

    Attributes:
        values: What the line holds.
        line: Its number, counted from 1.
        place: File and line, as messages name them.
    """

    values: dict[str, Any]
    line: int
    place: str


def read_rows(path: Path, check: Check, on_bad: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Reads a JSON Lines file one row at a time; blank lines are passed over.

    Args:
        path: The file, in UTF-8.
        check: Says what is wrong with a row beyond its being a JSON object.
        on_bad: Called with the message of a bad line, which is then left out. Without it a bad line is an error.

    Yields:
        The rows, in their order.

    Raises:
        ValueError: A line is bad; the message names file, line and reason.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    with path.open("rb") as file:
        # The delay keeps the bar away from files that are read in a moment.
        for line, text in enumerate(tqdm(file, desc=f"Reading {path.name}", unit=" rows", delay=2), start=1):
            if not text.strip().removeprefix(BYTE_ORDER_MARK):
                continue
            place = f"{path}, line {line}"
            values, problem = _parse(text.removeprefix(BYTE_ORDER_MARK) if line == 1 else text)
            problem = problem or check(values)
            if problem is None:
                yield Row(values, line, place)
            elif on_bad is None:
                raise ValueError(f"{place}: {problem}")
            else:
                on_bad(f"{place}: {problem}")


def dump_row(values: dict[str, Any]) -> str:
    """One line of a JSON Lines file, with its line break."""
    text = json.dumps(values, ensure_ascii=False)
    # Half a surrogate pair, which JSON can escape and UTF-8 cannot hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(values)
    return text + "\n"


def _parse(text: bytes) -> tuple[dict[str, Any], str | None]:
    """The object of a line, and what is wrong with it."""
    try:
        values = parse_json(text)
    except JsonTextError as error:
        return {}, str(error)
    if not isinstance(values, dict):
        return {}, f"a row is a JSON object, got {type(values).__name__}"
    return values, None
