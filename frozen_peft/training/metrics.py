# SPDX-License-Identifier: Apache-2.0
"""What a run logs about its contexts, and of where its time goes."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Literal

import torch

from frozen_peft.context import ContextEncoder
from frozen_peft.utils.stopwatch import Mode, Stopwatch

__all__ = ["PARTS", "ContextMetrics", "Part", "StepTimes"]

Part = Literal["data", "compute", "evaluation", "saving"]
PARTS: tuple[Part, ...] = ("data", "compute", "evaluation", "saving")


class _Figures:
    """What is counted until the next log."""

    def __init__(self, device: torch.device):
        self.num_tokens_asked = self.num_tokens_encoded = 0
        self.step, self.prefill = Stopwatch(device), Stopwatch(device)


class ContextMetrics:
    """Figures about contexts since the last log, of this process, of training and evaluation apart.

    Args:
        encoder: Whose work is counted.
        device: Where it runs.
        name: Of the figures.
    """

    def __init__(self, encoder: ContextEncoder, device: torch.device, name: str = "context"):
        self._encoder, self._name = encoder, name
        self._figures: dict[Mode, _Figures] = {"train": _Figures(device), "eval": _Figures(device)}

    def step(self, mode: Mode) -> AbstractContextManager[None]:
        """Counts the time of a batch, its contexts included."""
        return self._figures[mode].step.running()

    @contextmanager
    def prefill(self, mode: Mode) -> Iterator[None]:
        """Counts what the encoder does, and its time."""
        figures, before = self._figures[mode], replace(self._encoder.counts)
        with figures.prefill.running():
            yield
        figures.num_tokens_asked += self._encoder.counts.num_tokens_asked - before.num_tokens_asked
        figures.num_tokens_encoded += self._encoder.counts.num_tokens_encoded - before.num_tokens_encoded

    def read(self, mode: Mode, *, seconds_elsewhere: float = 0.0) -> dict[str, float]:
        """Names and values to log; none where no context was asked for.

        Args:
            mode: Of what.
            seconds_elsewhere: Time of the batches that went neither into contexts nor into decisions.

        Of the encoder of a training these are, of another one under its own name:

        - `context/tokens_encoded`: context tokens that ran through the model.
        - `context/tokens_reused`: context tokens that decisions read and that did not have to.
        - `context/hit_rate`: share of the latter in both.
        - `context/memory_bytes`, `context/disk_bytes`: what the store holds, if there is one.
        - `context/prefill_seconds`, `context/decision_seconds`: time to encode or find contexts, and time of forward
          and backward over them, where its steps are counted.
        """
        figures = self._figures[mode]
        asked, encoded = figures.num_tokens_asked, figures.num_tokens_encoded
        if not asked:
            return {}
        figures.num_tokens_asked = figures.num_tokens_encoded = 0
        prefill_seconds = figures.prefill.read()
        values = {
            "tokens_encoded": float(encoded),
            "tokens_reused": float(asked - encoded),
            "hit_rate": (asked - encoded) / asked,
            "prefill_seconds": prefill_seconds,
        }
        if (step_seconds := figures.step.read()) > 0.0:
            values["decision_seconds"] = max(step_seconds - prefill_seconds - seconds_elsewhere, 0.0)
        if self._encoder.store is not None:
            values["memory_bytes"] = float(self._encoder.store.num_bytes)
            values["disk_bytes"] = float(self._encoder.store.num_bytes_on_disk)
        return {f"{self._name}/{name}": value for name, value in values.items()}


class StepTimes:
    """Seconds of each part of a training, and of all of it, since the last log, of this process.

    On a GPU the parts are times of its own stream: of `data`, what the GPU waited.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device):
        self._watches = {part: Stopwatch(device) for part in PARTS}
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
