# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as people write them: `8GiB`, `1.5 GB`."""

import re
from fractions import Fraction

__all__ = ["format_size", "parse_size"]

PREFIXES = ("", "k", "m", "g", "t")
UNITS = {f"{prefix}b": 1000**power for power, prefix in enumerate(PREFIXES)}
UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(PREFIXES) if prefix}
SIZE = re.compile(r"([0-9]{1,18})(\.[0-9]{1,18})?(?: ?([kmgt]?i?b))?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes that a size stands for: a whole number, or a number with a unit from B to TB or TiB in any case.

    Fractions of a byte are dropped.

    Raises:
        ValueError: It is negative, or not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    whole, fraction, unit = match.groups() if match else ("", None, None)
    factor = UNITS.get((unit or "b").lower())
    # A fraction of bytes is more likely a unit forgotten.
    if match is None or factor is None or (fraction and factor == 1):
        raise ValueError(
            f"{text!r} is not a size. Write a whole number of bytes, or a number with a unit from kB to TB or KiB to "
            "TiB, such as '8GiB'."
        )
    return int(Fraction(whole + (fraction or "")) * factor)


def format_size(num_bytes: int) -> str:
    """A size in its largest binary unit, rounded to two decimals: `1.5 GiB`."""
    power = min((num_bytes.bit_length() - 1) // 10, len(PREFIXES) - 1) if num_bytes else 0
    if power == 0:
        return f"{num_bytes} B"
    number = f"{num_bytes / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{number} {PREFIXES[power].upper()}iB"
