# SPDX-License-Identifier: Apache-2.0
"""Where the time of a training goes, beside what contexts and decisions take (`metrics`)."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from frozen_peft.training.engines import DistributedTrainer
from frozen_peft.training.metrics import Stopwatch

__all__ = ["PARTS", "Part", "StepTimes", "TimedTrainer"]

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


class TimedTrainer(DistributedTrainer):
    """`DistributedTrainer` that logs where its time went (`StepTimes.read`).

    Everything is inherited but these hooks, which time their parent's: `train`, `get_batch_samples`, `training_step`,
    `evaluate` and `_save_checkpoint`; `log` adds the figures to the logs of training.
    """

    # Made when training begins; what runs before that is not counted.
    _step_times: StepTimes | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, timed from here."""
        self._step_times = StepTimes(self.args.device)
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, timed as `data`."""
        with self._timed("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's, timed as `compute`."""
        with self._timed("compute"):
            return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's, timed as `evaluation`."""
        with self._timed("evaluation"):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the times of training in its logs, the last one included."""
        if self._step_times is not None and ("loss" in logs or "train_runtime" in logs):
            logs |= self._step_times.read()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with self._timed("saving"):
            super()._save_checkpoint(model, trial)

    def _timed(self, part: Part) -> AbstractContextManager[None]:
        return nullcontext() if self._step_times is None else self._step_times.running(part)
