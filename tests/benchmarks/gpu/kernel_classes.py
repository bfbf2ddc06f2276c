# SPDX-License-Identifier: Apache-2.0
"""Where the time of a profile goes: kernels by what their names say, and the gaps between them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

# The first that matches counts. Names as bitsandbytes, flash-linear-attention, causal-conv1d, PyTorch and cuBLAS give
# them to their kernels; on a CPU, as PyTorch calls its operators.
CLASSES: tuple[tuple[str, str], ...] = (
    ("dequantization", r"dequant|kquantize|kgemm_4bit|gemv_4bit"),
    (
        "Gated DeltaNet",
        r"delta_rule|chunk_fwd|chunk_bwd|chunk_scaled_dot|chunk_local_cumsum|wy_fast|recompute_w_u|solve_tril|"
        r"prepare_wy|fused_recurrent|l2norm|triangular|trsm",
    ),
    ("convolution", r"conv1d|conv_depthwise|convolution|cudnn.*conv"),
    ("attention", r"flash|fmha|attention|mha_"),
    (
        "matrix products",
        r"gemm|cutlass|cublas|nvjet|xmma|sm\d+_.*(tensorop|mma)|::mm$|::bmm$|::addmm$|::linear$|::matmul$",
    ),
    ("copies", r"memcpy|memset|::copy_$|::clone$|::_to_copy$|::cat$|direct_copy|CatArray"),
    ("softmax and norms", r"softmax|norm|rsqrt|reduce_kernel|mean|::sum$"),
    ("elementwise", r"elementwise|vectorized|triton_poi|::add|::mul|::silu|::sigmoid|::exp|::neg|::sub|::div"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran: name, start and duration in microseconds."""

    name: str
    start: float
    duration: float


def class_of(name: str) -> str:
    """What a kernel of this name is for; `other` where nothing is known of it."""
    for kind, pattern in CLASSES:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def breakdown(kernels: Iterable[Kernel], wall: float) -> dict[str, float]:
    """Share of the wall time by class, with `gaps`: the time in which no kernel ran.

    Kernels that overlap are counted by the time they add to what ran before, so that all shares add up to one.

    Args:
        kernels: In any order.
        wall: Microseconds from the beginning of the first to the end of the work.
    """
    shares: dict[str, float] = {}
    end = float("-inf")
    busy = 0.0
    for kernel in sorted(kernels, key=lambda kernel: (kernel.start, kernel.start + kernel.duration)):
        stop = kernel.start + kernel.duration
        added = max(stop - max(kernel.start, end), 0.0)
        end = max(end, stop)
        busy += added
        kind = class_of(kernel.name)
        shares[kind] = shares.get(kind, 0.0) + added
    wall = max(wall, busy)
    shares["gaps"] = wall - busy
    return {kind: amount / wall if wall else 0.0 for kind, amount in sorted(shares.items(), key=lambda pair: -pair[1])}


def kernels_of(events: Sequence[FunctionEvent], device_type: str) -> list[Kernel]:
    """The kernels among a profile's events: on a CPU, the outermost operators of which a class is known."""
    wanted = DeviceType.CPU if device_type == "cpu" else DeviceType.CUDA
    return [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in events
        # Marks of ranges are no kernels.
        if event.device_type == wanted
        and not event.is_user_annotation
        and (device_type != "cpu" or _is_outermost(event))
    ]


def _is_outermost(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if class_of(parent.name) != "other":
            return False
        parent = parent.cpu_parent
    return class_of(event.name) != "other"
