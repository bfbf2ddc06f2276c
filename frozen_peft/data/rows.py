# SPDX-License-Identifier: Apache-2.0
"""JSON Lines files of samples and probes: read with the place of each mistake."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from frozen_peft.data.json_text import has_half_pair, numbered_lines, parse_json
from frozen_peft.data.row_checks import kind_of

__all__ = ["Row", "dump_row", "read_rows"]

Made = TypeVar("Made")


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


def read_rows(
    path: Path,
    make: Callable[[Row], Made],
    on_bad: Callable[[str], None] | None = None,
    *,
    empty: str | None = None,
) -> Iterator[Made]:
    """Reads a JSON Lines file one row at a time; blank lines are passed over.

    Args:
        path: The file, in UTF-8.
        make: Makes something of a row; a `ValueError` says what is wrong with it.
        on_bad: Called with the message of a bad line, which is then left out. Without it a bad line is an error.
        empty: What to say where nothing was made, which then is an error too.

    Yields:
        What was made of the rows, in their order.

    Raises:
        ValueError: A line is bad, and the message names file, line and reason; or there is none.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    is_empty = True
    with path.open("rb") as file:
        # The delay keeps the bar away from files that are read in a moment.
        for line, text in numbered_lines(tqdm(file, desc=f"Reading {path.name}", unit=" rows", delay=2)):
            place = f"{path}, line {line}"
            try:
                values = parse_json(text)
                if not isinstance(values, dict):
                    raise ValueError(f"a row is a JSON object, got {kind_of(values)}")
                made = make(Row(values, line, place))
            except ValueError as error:
                if on_bad is None:
                    raise ValueError(f"{place}: {error}") from error
                on_bad(f"{place}: {error}")
            else:
                is_empty = False
                yield made
    if is_empty and empty is not None:
        raise ValueError(f"{path}: {empty}")


def dump_row(values: dict[str, Any]) -> str:
    """One line of a JSON Lines file, with its line break."""
    text = json.dumps(values, ensure_ascii=False)
    if has_half_pair(text):
        text = json.dumps(values)
    return text + "\n"
