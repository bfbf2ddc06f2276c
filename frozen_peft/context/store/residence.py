# SPDX-License-Identifier: Apache-2.0
"""Where kept tensors lie: on the model's device while it has room to spare, else in pinned host memory."""

import sys
from collections.abc import Callable
from functools import cache

import torch

__all__ = ["DeviceCopy", "copy_ahead", "device_room", "pinned", "to_device", "to_host"]

# What stays free on a GPU for activations of prefill and decision: a tenth of it, and no less than this.
MIN_RESERVE = 2 << 30
RESERVED_SHARE = 10

Tensors = dict[str, torch.Tensor]


def device_room(device: torch.device) -> int:
    """Bytes that kept tensors may still take on a device, negative where they take too much already.

    Host memory has as much room as the budget says, which is counted elsewhere.
    """
    if device.type != "cuda":
        return sys.maxsize
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - max(total // RESERVED_SHARE, MIN_RESERVE)


def to_host(tensors: Tensors) -> Tensors:
    """Copies in host memory, pinned where they come from a GPU; the call returns when they are complete."""
    copies = {name: torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        copies[name].copy_(tensor)
    return copies


def pinned(tensors: Tensors) -> Tensors:
    """Copies of tensors of host memory in pinned memory; needs CUDA."""
    return {name: tensor.pin_memory() for name, tensor in tensors.items()}


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """The same tensors on a device; from pinned memory without holding up the caller."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


class DeviceCopy:
    """Tensors on their way from host memory to a device, beside what the device computes meanwhile.

    It may begin in any thread, and be dropped without waiting for it: its memory on the device is given to later
    copies alone, which follow on the same stream, and PyTorch gives pinned memory to nobody before what reads it is
    over.

    Args:
        tensors: In pinned memory.
        device: Where they go.

    Raises:
        OutOfMemoryError: The device has too little memory.
    """

    def __init__(self, tensors: Tensors, device: torch.device):
        self._device = device
        # The source is held until the copy is waited for, whatever becomes of its owner.
        self._source: Tensors | None = tensors
        stream = _copy_stream(device)
        with torch.cuda.stream(stream):
            self._tensors = to_device(tensors, device)
            self._arrived = stream.record_event() if stream is not None else None

    def wait(self) -> Tensors:
        """The tensors on the device; what is queued there from now on runs after they have arrived."""
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            # The event, not the stream: copies that began later are not waited for.
            current.wait_event(self._arrived)
            for tensor in self._tensors.values():
                # They were allocated for the other stream, and may go only after what is queued on this one.
                tensor.record_stream(current)
        self._source = None
        return self._tensors


def copy_ahead(tensors: Tensors, device: torch.device, room: Callable[[torch.device], int]) -> DeviceCopy | None:
    """Begins a copy to a device where it has room; None where it has none, and the tensors stay where they are.

    Args:
        tensors: In pinned memory.
        device: Where they go.
        room: Bytes that the device has room for.
    """
    if room(device) < sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()):
        return None
    try:
        return DeviceCopy(tensors, device)
    except torch.OutOfMemoryError:
        # The thread that computes was quicker to take the room. The tensors are copied when they are needed.
        return None


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One stream for all copies to a device, whose allocator keeps memory for each stream apart."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
