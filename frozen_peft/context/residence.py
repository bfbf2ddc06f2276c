# SPDX-License-Identifier: Apache-2.0
"""Where kept tensors lie: on the model's device while it has room to spare, else in pinned host memory."""

import sys

import torch

__all__ = ["DeviceCopy", "device_room", "pinned", "to_device", "to_host"]

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

    Args:
        tensors: In pinned memory.
        device: Where they go.
    """

    def __init__(self, tensors: Tensors, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(self._stream):
            self._tensors = to_device(tensors, device)

    def wait(self) -> Tensors:
        """The tensors on the device; what is queued there from now on runs after they have arrived."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in self._tensors.values():
                tensor.record_stream(current)
        return self._tensors
