# SPDX-License-Identifier: Apache-2.0
"""The most memory that a stretch of a run takes: exact, and free while it runs, since the system keeps it anyway."""

import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["PeakMemory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What resets the peak and nothing else (`man proc_pid_clear_refs`).
_RESET_PEAK = "5"


class PeakMemory:
    """The peak from where this is made on: what PyTorch has allocated on the GPU, else what is resident.

    Where the system cannot begin a new peak (outside Linux), the process's own counts, and what is above the model is
    known only if that peak has moved since.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._has_own_peak = True
        if self._on_gpu:
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
            self._start = sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            self._has_own_peak = False
        self._start, self._peak_before = psutil.Process().memory_info().rss, self._resident_peak()

    def read(self) -> dict[str, Any]:
        """The content of `memory.json`.

        - `peak_bytes`: the peak, the model included.
        - `peak_bytes_above_model`: the peak above what was there at the start, null where that is not known.
        - `how`: `cuda` or `rss`.
        """
        if self._on_gpu:
            peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
            return {"peak_bytes_above_model": peak - self._start, "peak_bytes": peak, "how": "cuda"}
        peak = self._resident_peak()
        known = self._has_own_peak or peak > self._peak_before
        # Pages that the system has taken back since would make it negative.
        above = max(peak - self._start, 0) if known else None
        return {"peak_bytes_above_model": above, "peak_bytes": peak, "how": "rss"}

    def _resident_peak(self) -> int:
        if self._has_own_peak:
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        # Kibibytes, but bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
