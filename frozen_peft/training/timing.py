# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training goes, beside what contexts and decisions take (`metrics`)."""

import time
from contextlib import AbstractContextManager
from typing import Literal

import torch

from frozen_peft.utils.stopwatch import Stopwatch

__all__ = ["PARTS", "Part", "StepTimes"]

Part = Literal["data", "compute", "evaluation", "saving"]
PARTS: tuple[Part, ...] = ("data", "compute", "evaluation", "saving")


class StepTimes:
    """Seconds of each part of a training, and of all of it, since the last log, of this process.

    On a GPU the parts are times of its own stream: of `data`, what the GPU waited.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted; all of it begins now."""
        self._watches = {part: Stopwatch(self._device) for part in PARTS}
        self._start = time.perf_counter()

    def running(self, part: Part) -> AbstractContextManager[None]:
        """Counts the time inside as that part's."""
        return self._watches[part].running()

    def read(self) -> dict[str, float]:
        """Names and values to log; a part that took no time is left out.

        - `time/data_seconds`: waiting for the samples of a step.
        - `time/compute_seconds`: forward and backward, contexts included.
        - `time/evaluation_seconds`, `time/saving_seconds`: held-out loss and checkpoints during training.
        - `time/wall_seconds`: all of it, the optimizer and what else there is included.
        """
        seconds = {f"time/{part}_seconds": watch.read() for part, watch in self._watches.items()}
        now = time.perf_counter()
        wall, self._start = now - self._start, now
        return {name: value for name, value in seconds.items() if value} | {"time/wall_seconds": wall}
