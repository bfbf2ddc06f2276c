# SPDX-License-Identifier: Apache-2.0
"""Time that a part of a run takes, on a GPU too."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

__all__ = ["Mode", "Stopwatch"]

# Training and evaluation are measured apart; these are the names that TRL keeps their metrics under.
Mode = Literal["train", "eval"]


class Stopwatch:
    """Adds up the time of what runs inside `running`, without making a GPU wait.

    Args:
        device: Where the work is done; on a GPU its own events are read, when the time is.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time inside, failed or not."""
        start = self._mark()
        try:
            yield
        finally:
            stop = self._mark()
            if self._on_gpu:
                self._spans.append((start, stop))
            else:
                self._seconds += stop - start

    def read(self) -> float:
        """Seconds since the last call."""
        for start, stop in self._spans:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._spans.clear()
        return seconds

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
