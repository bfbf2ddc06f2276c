# SPDX-License-Identifier: Apache-2.0
"""Values of a JSON file that remember where they stand, so that what is amiss can be named."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Found", "MalformedError"]


class MalformedError(ValueError):
    """A file holds something else than it should."""


@dataclass(frozen=True)
class Found:
    """A value of a JSON file.

    Attributes:
        value: What was read.
        file: The file's name.
        place: Its place in it, such as `results[2].margin`; empty for all of it.

    Every method raises `MalformedError`, which names file and place, where the value is of another kind; `get` and
    `rows_of` take what is missing.
    """

    value: Any
    file: str
    place: str = ""

    def __getitem__(self, key: str) -> "Found":
        """A field of an object, which must be there."""
        self._require(isinstance(self.value, dict), "an object")
        place = f"{self.place}.{key}" if self.place else key
        if key not in self.value:
            raise MalformedError(f"{self.file}: there is no `{place}`")
        return Found(self.value[key], self.file, place)

    def get(self, key: str) -> "Found | None":
        """A field of an object; None where it is missing or null, or this is no object."""
        if not isinstance(self.value, dict) or self.value.get(key) is None:
            return None
        return self[key]

    def items(self) -> Iterator[tuple[str, "Found"]]:
        """Names and values of an object."""
        self._require(isinstance(self.value, dict), "an object")
        yield from ((str(key), self[key]) for key in self.value)

    def rows(self) -> list["Found"]:
        """The values of a list."""
        self._require(isinstance(self.value, list), "a list")
        return [Found(item, self.file, f"{self.place}[{index}]") for index, item in enumerate(self.value)]

    def rows_of(self, key: str) -> list["Found"]:
        """The values of a list in a field of an object; none where that is missing or null."""
        values = self.get(key)
        return [] if values is None else values.rows()

    def number(self) -> float:
        """A finite number."""
        value = self.value
        self._require(isinstance(value, int | float) and not isinstance(value, bool), "a number")
        self._require(-1e300 < value < 1e300, "a finite number")
        return float(value)

    def number_from(self, low: float, high: float) -> float:
        """A number in a range, the ends included."""
        number = self.number()
        self._require(low <= number <= high, f"a number from {low:g} to {high:g}")
        return number

    def number_or_nan(self) -> float:
        """A number, which may be infinite or NaN, as the losses of a run that went astray."""
        value = self.value
        self._require(isinstance(value, int | float) and not isinstance(value, bool), "a number")
        return float(value) if abs(value) < 1e300 else math.nan

    def count(self) -> int:
        """A whole number of 0 or more."""
        self._require(isinstance(self.value, int) and not isinstance(self.value, bool), "a whole number")
        self._require(0 <= self.value < 2**63, "0 or more")
        return self.value

    def text(self) -> str:
        """A text."""
        self._require(isinstance(self.value, str), "text")
        return self.value

    def one_of(self, names: Collection[str]) -> str:
        """A text that is one of these."""
        text = self.text()
        if text not in names:
            raise MalformedError(f"{self.file}: `{self.place}` is {text[:40]!r}, expected one of {', '.join(names)}")
        return text

    def flag(self) -> bool:
        """True or false."""
        self._require(isinstance(self.value, bool), "true or false")
        return self.value

    def _require(self, holds: bool, expected: str) -> None:
        if not holds:
            where = f"`{self.place}`" if self.place else "the file"
            raise MalformedError(f"{self.file}: {where} is {_kind(self.value)}, expected {expected}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}" if abs(value) < 1e300 else "a number out of range"
    return names.get(type(value), f"of the kind {type(value).__name__}")
