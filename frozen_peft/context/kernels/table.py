# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs where, as one table: `RULES` for linear attention, `attention_rows` for attention.

An accelerated kernel runs where a rule says so, and PyTorch's reference everywhere else. The rules are read from top
to bottom, and the first that applies decides; the last applies always, so there is a choice for every machine. What is
known to be wrong somewhere is not run there, whatever the package itself allows.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from packaging.version import InvalidVersion, Version

from frozen_peft.utils.installed import module_versions

__all__ = [
    "KERNEL_MODULES",
    "Capabilities",
    "KernelRow",
    "Operation",
    "compute_capability_of",
    "current_capabilities",
    "has_16_bit_products",
    "has_flash_prefill",
    "is_accelerated",
    "kernel_choices",
    "kernel_rows",
    "operation_of",
]

# Modules whose functions transformers binds at import.
KERNEL_MODULES = ("fla", "causal_conv1d", "mamba_ssm")
# The oldest flash-linear-attention of which kernels and their limits were read.
FIRST_FLA = Version("0.6")
# Triton's own limit for NVIDIA cards, and that of PyTorch's flash attention.
AMPERE = (8, 0)
HOPPER = (9, 0)
BLACKWELL = (10, 0)
FIRST_TRITON_WITH_WRONG_BACKWARD = Version("3.4")
FIRST_TRITON_WITH_RIGHT_BACKWARD = Version("3.7.1")
# The widest heads that PyTorch's flash attention takes.
MAX_FLASH_HEAD_DIM = 256

# Compute capabilities of cards by a part of their name (developer.nvidia.com/cuda-gpus); the longest match counts.
CARDS = {
    "V100": (7, 0), "T4": (7, 5), "RTX 20": (7, 5),
    "A100": (8, 0), "A800": (8, 0), "A30": (8, 0),
    "A10": (8, 6), "A16": (8, 6), "A2": (8, 6), "A40": (8, 6), "RTX 30": (8, 6), "RTX A": (8, 6),
    "L4": (8, 9), "L20": (8, 9), "L40": (8, 9), "RTX 40": (8, 9), "RTX 6000 ADA": (8, 9),
    "H100": (9, 0), "H200": (9, 0), "H800": (9, 0), "H20": (9, 0), "GH200": (9, 0),
    "B100": (10, 0), "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3), "GB300": (10, 3),
    "RTX 50": (12, 0), "RTX PRO": (12, 0),
}  # fmt: skip

Operation = Literal["gated delta rule", "short convolution", "state-space scan", "one step"]


@dataclass(frozen=True)
class Capabilities:
    """What a choice of kernels depends on.

    Attributes:
        device_type: Of the tensors: `cpu`, `cuda` (AMD's cards too), `xpu`, `mps` or another.
        compute_capability: Of an NVIDIA card; None for any other device.
        fla: Version of flash-linear-attention; None: not installed. The same for those below.
        triton: Version of Triton.
        causal_conv1d: Version of causal-conv1d.
        mamba_ssm: Version of mamba-ssm.
        flash_attention: PyTorch was built with its flash attention, and it is not switched off.
    """

    device_type: str
    compute_capability: tuple[int, int] | None = None
    fla: Version | None = None
    triton: Version | None = None
    causal_conv1d: Version | None = None
    mamba_ssm: Version | None = None
    flash_attention: bool = True

    @property
    def has_triton(self) -> bool:
        """Whether Triton is there, and supports the card."""
        return self.triton is not None and (self.compute_capability or AMPERE) >= AMPERE

    @property
    def is_hopper(self) -> bool:
        return self.compute_capability == HOPPER

    @property
    def is_blackwell(self) -> bool:
        return self.compute_capability is not None and self.compute_capability >= BLACKWELL


@dataclass(frozen=True)
class KernelRow:
    """One line of what would run.

    Attributes:
        purpose: Where in a step.
        kernel: What runs there.
        reason: Why that one.
    """

    purpose: str
    kernel: str
    reason: str


class _Rule(NamedTuple):
    operations: tuple[Operation, ...]
    gradient: tuple[bool, ...]
    applies: Callable[[Capabilities], bool]
    accelerated: bool
    reason: str


_ALL: tuple[Operation, ...] = ("gated delta rule", "short convolution", "state-space scan", "one step")
_DELTA: tuple[Operation, ...] = ("gated delta rule",)
_TRITON: tuple[Operation, ...] = ("gated delta rule", "state-space scan", "one step")
_EITHER = (False, True)

# operations, with gradient, where, accelerated, why
RULES: tuple[_Rule, ...] = (
    _Rule(_ALL, _EITHER, lambda c: c.device_type not in ("cuda", "xpu"), False, "the kernels need a GPU"),
    _Rule(_DELTA, _EITHER, lambda c: c.fla is None, False, "flash-linear-attention is not installed"),
    _Rule(("short convolution",), _EITHER, lambda c: c.causal_conv1d is None, False,
          "causal-conv1d is not installed"),
    _Rule(("state-space scan",), _EITHER, lambda c: c.mamba_ssm is None, False, "mamba-ssm is not installed"),
    _Rule(_TRITON, _EITHER, lambda c: not c.has_triton, False,
          "Triton is not installed, or does not support cards below compute capability 8.0"),
    _Rule(_DELTA, _EITHER, lambda c: c.fla is not None and c.fla < FIRST_FLA, False,
          f"flash-linear-attention is older than {FIRST_FLA}"),
    _Rule(("one step",), (True,), lambda c: True, False, "the kernels for one token have no backward"),
    # flash-linear-attention issue 640; version 0.6 refuses to run it.
    _Rule(_DELTA, (True,), lambda c: c.is_hopper and c.triton is not None
          and FIRST_TRITON_WITH_WRONG_BACKWARD <= c.triton < FIRST_TRITON_WITH_RIGHT_BACKWARD, False,
          "on Hopper, Triton from 3.4 up to 3.7.1 gives wrong gradients of beta and decay"),
    # flash-linear-attention issues 607, 638 and 913. It goes when one of its versions is tested there.
    _Rule(_DELTA, (True,), lambda c: c.is_blackwell, False,
          "on Blackwell the backward is reported to fail or to give NaN, up to Triton 3.7"),
    _Rule(("one step",), _EITHER, lambda c: c.is_blackwell, False,
          "on Blackwell the kernel for one token is reported to read out of bounds"),
    _Rule(_ALL, _EITHER, lambda c: True, True, "supported"),
)  # fmt: skip


def is_accelerated(operation: Operation, gradient: bool, capabilities: Capabilities) -> tuple[bool, str]:
    """Whether an operation runs its accelerated kernel, and why."""
    for rule in RULES:
        if operation in rule.operations and gradient in rule.gradient and rule.applies(capabilities):
            return rule.accelerated, rule.reason
    raise AssertionError("the last rule applies always")


def operation_of(name: str) -> Operation:
    """What a kernel function of this name does."""
    if "recurrent" in name or "state_update" in name or "conv1d_update" in name:
        return "one step"
    if "gated_delta_rule" in name or "kda" in name:
        return "gated delta rule"
    return "short convolution" if name.endswith("causal_conv1d_fn") else "state-space scan"


def has_flash_prefill(capabilities: Capabilities, dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether PyTorch's flash attention can run a chunk's queries against all keys up to them, without a mask.

    Args:
        capabilities: Where the tensors are.
        dtype: Of queries, keys and values as the kernel gets them.
        head_dim: Of queries and keys.
        value_dim: Of values.
    """
    is_supported = capabilities.device_type == "cuda" and (capabilities.compute_capability or AMPERE) >= AMPERE
    return (
        is_supported
        and capabilities.flash_attention
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim == value_dim <= MAX_FLASH_HEAD_DIM
    )


def has_16_bit_products(device: torch.device) -> bool:
    """Whether PyTorch multiplies 16-bit matrices into float32 on a device, with bfloat16 among them."""
    compute_capability = current_capabilities(device).compute_capability
    return compute_capability is not None and compute_capability >= AMPERE


def kernel_choices(capabilities: Capabilities, dtype: torch.dtype = torch.bfloat16) -> tuple[KernelRow, ...]:
    """What would run in each part of a step, for models whose attention reads segments.

    Args:
        capabilities: Of the machine.
        dtype: In which the model computes.
    """
    rows = []
    for operation, package, reference in (
        ("gated delta rule", "flash-linear-attention", "PyTorch, in chunks of 64 tokens"),
        ("short convolution", "causal-conv1d", "PyTorch"),
        ("state-space scan", "mamba-ssm", "PyTorch"),
    ):
        for purpose, gradient in (("prefill", False), ("decision", True)):
            accelerated, reason = is_accelerated(operation, gradient, capabilities)  # type: ignore[arg-type]
            rows.append(KernelRow(f"{purpose}, {operation}", package if accelerated else reference, reason))
    accelerated, reason = is_accelerated("one step", False, capabilities)
    rows.append(KernelRow("sampling, one token", "the packages above" if accelerated else "PyTorch", reason))
    return (*rows, *attention_rows(capabilities, dtype))


def attention_rows(capabilities: Capabilities, dtype: torch.dtype) -> tuple[KernelRow, ...]:
    """The part of `kernel_choices` that is about attention."""
    if has_flash_prefill(capabilities, dtype, MAX_FLASH_HEAD_DIM, MAX_FLASH_HEAD_DIM):
        prefill = KernelRow("prefill, attention", "PyTorch's flash attention", "a chunk sits at the end of its keys")
    elif capabilities.device_type == "cpu":
        prefill = KernelRow(
            "prefill, attention", "PyTorch's flash attention for CPUs", "two segments, merged by log-sum-exp"
        )
    else:
        why = (
            "flash attention needs 16 bit and compute capability 8.0" if capabilities.flash_attention else "it is off"
        )
        prefill = KernelRow("prefill, attention", "blocks of keys, in PyTorch", why)
    decision = KernelRow(
        "decision, attention", "blocks of keys, in PyTorch", "no gradient of frozen keys and values, and no copy"
    )
    return prefill, decision


def kernel_rows(
    gpu: str | tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[KernelRow, ...]:
    """What would run on a card, with the packages that are installed here.

    Args:
        gpu: A card's name such as `"H100"`, a compute capability, or None: this machine's card, or its CPU.
        dtype: In which the model computes.

    Raises:
        ValueError: No card of this name is known.
    """
    if gpu is None:
        device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        return kernel_choices(current_capabilities(device), dtype)
    compute_capability = compute_capability_of(gpu) if isinstance(gpu, str) else gpu
    return kernel_choices(_with_installed(Capabilities("cuda", compute_capability)), dtype)


def compute_capability_of(name: str) -> tuple[int, int]:
    """Compute capability of a card by its name, such as `NVIDIA H100 80GB HBM3` or `h100`.

    Raises:
        ValueError: No card of this name is known.
    """
    words = name.upper().replace("GEFORCE ", "").replace("QUADRO ", "").replace("NVIDIA ", "").strip()
    known = [card for card in CARDS if words.startswith(card) or f" {card}" in words]
    if not known:
        raise ValueError(
            f"No card named {name!r} is known. Give its compute capability instead (such as 9.0), or one of "
            f"{', '.join(sorted(CARDS))}."
        )
    return CARDS[max(known, key=len)]


@functools.cache
def current_capabilities(device: torch.device) -> Capabilities:
    """What a device of this machine has."""
    compute_capability = None
    if device.type == "cuda" and torch.version.hip is None:
        compute_capability = torch.cuda.get_device_capability(device)
    flash = torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
    return _with_installed(Capabilities(device.type, compute_capability, flash_attention=flash))


def _with_installed(machine: Capabilities) -> Capabilities:
    versions = {name: _version_of(name) for name in ("triton", *KERNEL_MODULES)}
    return dataclasses.replace(machine, **versions)  # type: ignore[arg-type]


@functools.cache
def _version_of(module: str) -> Version | None:
    """Version of an importable module, the oldest of its parts; one that does not say its version is the newest."""
    versions = []
    for text in module_versions(module).values():
        try:
            versions.append(Version(text))
        except InvalidVersion:
            versions.append(Version("9999"))
    return min(versions, default=None)
