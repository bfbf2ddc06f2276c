# SPDX-License-Identifier: Apache-2.0
"""Where the time of prefill and decision goes, and the rate of prefill by chunk size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile

from frozen_peft.context import ContextEncoder, FrozenContext
from tests.benchmarks.gpu.device import Device
from tests.benchmarks.gpu.kernel_classes import breakdown, kernels_of
from tests.frozen_runs import frozen_gradients
from tests.reference import Sample, random_sample


def profiled(device: Device, run: Callable[[], Any]) -> dict[str, float]:
    """Share of the time of a run by class of kernel; run once before, unprofiled, for what is done once."""
    run()
    activity = ProfilerActivity.CUDA if device.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        seconds = device.seconds(run)
    return breakdown(kernels_of(found.events(), device.torch.type), seconds * 1e6)


def profile_step(
    model: PeftModel, device: Device, context: int, decision: int, chunk_size: int
) -> dict[str, dict[str, float]]:
    """Profiles of the prefill of a context, and of forward and backward of a decision over it."""
    made = random_sample(context, decision, low=3, high=model.config.get_text_config().vocab_size)
    sample = Sample(made.input_ids.to(device.torch), made.labels.to(device.torch))

    def prefill() -> FrozenContext:
        return _encoded(model, device, sample.context, chunk_size)

    shares = {"prefill": profiled(device, prefill)}
    frozen = prefill()

    def decide() -> None:
        with _autocast(device):
            frozen_gradients(model, [sample], frozen)

    try:
        shares["decision"] = profiled(device, decide)
    finally:
        model.zero_grad(set_to_none=True)
    return shares


def prefill_by_chunk(
    model: PeftModel, device: Device, context: int, sizes: Sequence[int]
) -> list[dict[str, float | int | None]]:
    """Tokens per second of prefill by chunk size; None where it ran out of memory."""
    tokens = random_sample(context, 2).context.to(device.torch)
    found: list[dict[str, float | int | None]] = []
    for size in sizes:
        device.clear()
        try:
            seconds = device.seconds(lambda size=size: _encoded(model, device, tokens, size))
        except torch.OutOfMemoryError:
            seconds = None
        found.append({"chunk_size": size, "tokens_per_second": context / seconds if seconds else None})
    return found


def _autocast(device: Device) -> torch.autocast:
    return torch.autocast(device.torch.type, torch.bfloat16, enabled=device.on_gpu)


def _encoded(model: PeftModel, device: Device, tokens: torch.Tensor, chunk_size: int) -> FrozenContext:
    encoder = ContextEncoder(model, chunk_size=chunk_size)
    with _autocast(device):
        frozen = encoder.encode([tokens])
    if encoder.chunk_size != chunk_size:
        # It went on in smaller chunks, whose rate is another row's.
        raise torch.OutOfMemoryError(f"chunks of {chunk_size} tokens do not fit")
    return frozen
