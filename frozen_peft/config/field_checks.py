# SPDX-License-Identifier: Apache-2.0
"""What fields of a configuration are checked by; errors name the field, what was found and what was expected."""

from dataclasses import fields
from typing import Any, get_args

from frozen_peft.utils.sizes import parse_size

__all__ = ["require", "require_choice", "require_rows_of_one", "require_size"]


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuses a field's value.

    Raises:
        ValueError: It does not hold; the message names field, value and what was expected.
    """
    if not holds:
        raise ValueError(f"`{name}` must be {expected}, found {value!r}.")


def require_rows_of_one(config: Any, reason: str) -> None:
    """Refuses fields that put several samples into one row.

    Raises:
        ValueError: There is one; the message begins with the reason.
    """
    for name in ("packing", "padding_free"):
        # Not every configuration of TRL has these.
        if getattr(config, name, False):
            raise ValueError(f"{reason}, and `{name}` puts several into one row. Leave one of the two out.")


def require_size(config: Any, name: str) -> int:
    """A field in bytes.

    Raises:
        ValueError: It is no size.
    """
    try:
        return parse_size(getattr(config, name))
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None


def require_choice(config: Any, name: str) -> None:
    """Refuses what is none of a field's choices, those of its type.

    Raises:
        ValueError: It is none of them; the message lists them.
    """
    choices = get_args(next(f for f in fields(config) if f.name == name).type)
    require(getattr(config, name) in choices, name, getattr(config, name), f"one of {', '.join(choices)}")
