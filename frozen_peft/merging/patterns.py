# SPDX-License-Identifier: Apache-2.0
"""Regular expressions in an adapter's configuration, which may come from anyone: tried out under a limit of time."""

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["require_quick_patterns"]

# Processor time; all names of a large model take far below one.
LIMIT_SECONDS = 3.0


def require_quick_patterns(path: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Matches every pattern as PEFT will, and gives up on one that backtracks without end.

    Args:
        path: The configuration's file, for messages.
        config: The configuration.
        names: The model's module and parameter names.

    Raises:
        ValueError: A pattern takes too long.
    """
    patterns = [
        value for field in ("target_modules", "exclude_modules") if isinstance(value := config.get(field), str)
    ]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns += [rf"(.*\.)?({key})$" for key in config.get(field) or {}]
    names = list(names)
    pattern = ""
    try:
        with _time_limit(LIMIT_SECONDS):
            for pattern in patterns:
                compiled = re.compile(pattern)
                for name in names:
                    compiled.fullmatch(name)
    except re.error:
        # PEFT says so, and which.
        return
    except TimeoutError as error:
        raise ValueError(
            f"The patterns of {path} take longer than {LIMIT_SECONDS:g} s to match: {pattern[:200]!r}. Name the "
            "modules one by one."
        ) from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after some processor time, in the main thread; signals reach no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
