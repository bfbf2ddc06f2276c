# SPDX-License-Identifier: Apache-2.0
"""Which errors the command line shows as one message, and which keep their traceback."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from frozen_peft.errors import ContextMismatchError

__all__ = ["CommandError", "reported"]


class CommandError(Exception):
    """What the user can mend, in one message."""


@contextmanager
def reported(raised_in: str = "") -> Iterator[None]:
    """Turns errors that a library raises on purpose into `CommandError`.

    Args:
        raised_in: Only errors raised by this package, for stretches in which an error from below would be a bug whose
            traceback is needed. Empty: by any, for stretches that only read and check what the user gave.

    Raises:
        CommandError: With the message of the `ValueError`, `NotImplementedError`, `ContextMismatchError`, `OSError`
            (which a missing file or dataset is) or `ModuleNotFoundError` (of an optional package) that was raised.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ContextMismatchError, OSError, ModuleNotFoundError) as error:
        *_, (raising, _) = traceback.walk_tb(error.__traceback__)
        if raised_in and raising.f_globals.get("__name__", "").partition(".")[0] != raised_in:
            raise
        raise CommandError(str(error) or type(error).__name__) from error
