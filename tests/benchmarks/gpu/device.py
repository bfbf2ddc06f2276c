# SPDX-License-Identifier: Apache-2.0
"""The device that is measured, and the time that there is for it."""

import gc
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

GIBIBYTE = 1 << 30
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "flash-linear-attention",
    "causal-conv1d",
)


class Budget:
    """Seconds for the whole benchmark.

    Args:
        seconds: From now on.
        clock: What tells the time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def allows(self, seconds: float) -> bool:
        """Whether there is time for something that is expected to take so long."""
        return seconds <= self.left()


class Device:
    """A GPU, or in smoke runs the CPU, of which memory is not measured.

    Args:
        kind: `cuda` or `cpu`.
    """

    def __init__(self, kind: str):
        self.torch = torch.device(kind)
        self.on_gpu = kind == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def memory_bytes(self) -> int | None:
        return torch.cuda.get_device_properties(self.torch).total_memory if self.on_gpu else None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def answers(self) -> bool:
        """Whether it still computes; after some errors of CUDA it does not, until the process ends."""
        try:
            torch.ones(1, device=self.torch).item()
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False
        return True

    def clear(self) -> None:
        """Gives back what is no longer used, and begins a new peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def allocated_bytes(self) -> int | None:
        return torch.cuda.memory_allocated() if self.on_gpu else None

    def peak_bytes(self) -> tuple[int, int] | tuple[None, None]:
        """The most that tensors took, and that the allocator held, since `clear`."""
        return (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if self.on_gpu else (None, None)

    @contextmanager
    def capped(self, gibibytes: int | None) -> Iterator[None]:
        """Lets the allocator have what it would have on a card of so many GiB; what CUDA itself takes counts."""
        if gibibytes is None or not self.on_gpu:
            yield
            return
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(min(max(gibibytes * GIBIBYTE - outside, 0) / total, 1.0))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def seconds(self, run: Callable[[], Any]) -> float:
        """How long something takes, from an idle device to an idle device."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def facts(self) -> dict[str, str]:
        """The device and the versions that results belong to, in words."""
        facts = {"device": "CPU (smoke run: figures mean nothing)"}
        if self.on_gpu:
            properties = torch.cuda.get_device_properties(self.torch)
            facts = {
                "device": f"{properties.name}, {properties.total_memory / GIBIBYTE:.1f} GiB, compute capability "
                f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
            }
        return facts | {"versions": ", ".join(f"{name} {version}" for name, version in versions().items())}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; packages that are missing are named as such."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def matmul_rate(device: Device, size: int, seconds: float) -> float:
    """Operations per second of a product of two square matrices in 16 bit (float32 on a CPU): the card's own rate."""
    left, right = (torch.randn(size, size, device=device.torch, dtype=device.dtype) for _ in range(2))
    device.seconds(lambda: left @ right)
    once = max(device.seconds(lambda: left @ right), 1e-6)
    repeats = max(int(seconds / once), 3)

    def repeat() -> None:
        for _ in range(repeats):
            torch.mm(left, right)

    return 2.0 * size**3 * repeats / device.seconds(repeat)


def host_copy_rate(device: Device, num_bytes: int = 256 << 20) -> float | None:
    """Bytes per second from pinned host memory to the card; None on a CPU."""
    if not device.on_gpu:
        return None
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch)
    device.seconds(lambda: target.copy_(host, non_blocking=True))
    return num_bytes / device.seconds(lambda: target.copy_(host, non_blocking=True))
