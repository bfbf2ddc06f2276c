# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs where, as one table: `RULES` for linear attention, `attention_rows` for attention.

An accelerated kernel runs unless a rule speaks against it, and PyTorch's reference everywhere else, so there is a
choice for every machine. What is known to be wrong somewhere is not run there, whatever the package itself allows.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from packaging.version import InvalidVersion, Version

from frozen_peft.utils.cards import find_card
from frozen_peft.utils.installed import module_versions

__all__ = [
    "KERNEL_MODULES",
    "Capabilities",
    "KernelRow",
    "Operation",
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
    def is_ampere_or_later(self) -> bool:
        """Whether an NVIDIA card is not too old; those of other makers count as new."""
        return (self.compute_capability or AMPERE) >= AMPERE

    @property
    def is_blackwell(self) -> bool:
        return self.compute_capability is not None and self.compute_capability >= BLACKWELL

    @property
    def has_wrong_gated_backward(self) -> bool:
        return (
            self.compute_capability == HOPPER
            and self.triton is not None
            and (FIRST_TRITON_WITH_WRONG_BACKWARD <= self.triton < FIRST_TRITON_WITH_RIGHT_BACKWARD)
        )


@dataclass(frozen=True)
class KernelRow:
    """One line of what would run.

    Attributes:
        purpose: Where in a step.
        kernel: What runs there.
        reason: Why that one.
        proven: Where its figures were held to those of plain forwards: `on a CPU`, `in Triton's interpreter` (what the
            kernel says, but not what a compiler makes of it), `its call alone` (the package's compiled part stood in
            for), or `not`. None was run on a card.
    """

    purpose: str
    kernel: str
    reason: str
    proven: str


class _Rule(NamedTuple):
    """Why some operations, with gradient, without or (None) in both, are not accelerated where it applies."""

    operations: tuple[Operation, ...]
    gradient: bool | None
    applies: Callable[[Capabilities], bool]
    reason: str


_ALL: tuple[Operation, ...] = get_args(Operation)
_DELTA: tuple[Operation, ...] = ("gated delta rule",)
_CONVOLUTION: tuple[Operation, ...] = ("short convolution",)
_SCAN: tuple[Operation, ...] = ("state-space scan",)
_STEP: tuple[Operation, ...] = ("one step",)

# What the kernels of a package do that are not for one token.
_OPERATIONS: dict[str, Operation] = {
    "fla": "gated delta rule",
    "causal_conv1d": "short convolution",
    "mamba_ssm": "state-space scan",
}

RULES = (
    _Rule(_ALL, None, lambda c: c.device_type not in ("cuda", "xpu"), "the kernels need a GPU"),
    _Rule(_DELTA, None, lambda c: c.fla is None, "flash-linear-attention is not installed"),
    _Rule(_CONVOLUTION, None, lambda c: c.causal_conv1d is None, "causal-conv1d is not installed"),
    _Rule(_SCAN, None, lambda c: c.mamba_ssm is None, "mamba-ssm is not installed"),
    _Rule((*_DELTA, *_SCAN, *_STEP), None, lambda c: c.triton is None or not c.is_ampere_or_later,
          "Triton is not installed, or does not support cards below compute capability 8.0"),
    _Rule(_DELTA, None, lambda c: c.fla is not None and c.fla < FIRST_FLA,
          f"flash-linear-attention is older than {FIRST_FLA}"),
    _Rule(_STEP, True, lambda c: True, "the kernels for one token have no backward"),
    # flash-linear-attention issue 640; version 0.6 refuses to run it.
    _Rule(_DELTA, True, lambda c: c.has_wrong_gated_backward,
          "on Hopper, Triton from 3.4 up to 3.7.1 gives wrong gradients of beta and decay"),
    # flash-linear-attention issues 607, 638 and 913. It goes when one of its versions is tested there.
    _Rule(_DELTA, True, lambda c: c.is_blackwell,
          "on Blackwell the backward is reported to fail or to give NaN, up to Triton 3.7"),
    _Rule(_STEP, None, lambda c: c.is_blackwell,
          "on Blackwell the kernel for one token is reported to read out of bounds"),
)  # fmt: skip

# `docs/benchmarks/kernels.md` has the figures.
_CPU = "on a CPU"
_PROVEN = {
    "flash-linear-attention": "in Triton's interpreter",
    "causal-conv1d": "its call alone",
    "mamba-ssm": "in Triton's interpreter",
    "the packages above": "in Triton's interpreter",
}

# Rows of `kernel_choices` for linear attention: purpose, operation, with gradient, what is accelerated, what is not.
_CHUNKED = "PyTorch, in chunks of 64 tokens"
_LINEAR_ROWS: tuple[tuple[str, Operation, bool, str, str], ...] = (
    ("prefill, gated delta rule", "gated delta rule", False, "flash-linear-attention", _CHUNKED),
    ("decision, gated delta rule", "gated delta rule", True, "flash-linear-attention", _CHUNKED),
    ("prefill, short convolution", "short convolution", False, "causal-conv1d", "PyTorch"),
    ("decision, short convolution", "short convolution", True, "causal-conv1d", "PyTorch"),
    ("prefill, state-space scan", "state-space scan", False, "mamba-ssm", "PyTorch"),
    ("decision, state-space scan", "state-space scan", True, "mamba-ssm", "PyTorch"),
    ("sampling, one token", "one step", False, "the packages above", "PyTorch"),
)


def is_accelerated(operation: Operation, gradient: bool, capabilities: Capabilities) -> tuple[bool, str]:
    """Whether an operation runs its accelerated kernel, and why."""
    for rule in RULES:
        if operation in rule.operations and rule.gradient in (None, gradient) and rule.applies(capabilities):
            return False, rule.reason
    return True, "supported"


def operation_of(kernel: str, package: str) -> Operation | None:
    """What a kernel does, by its name in its package; None for one of another package than `KERNEL_MODULES`."""
    if package not in _OPERATIONS:
        return None
    is_step = any(part in kernel for part in ("recurrent", "state_update", "conv1d_update"))
    return "one step" if is_step else _OPERATIONS[package]


def has_flash_prefill(capabilities: Capabilities, dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether PyTorch's flash attention can run a chunk's queries against all keys up to them, without a mask.

    Args:
        capabilities: Where the tensors are.
        dtype: Of queries, keys and values as the kernel gets them.
        head_dim: Of queries and keys.
        value_dim: Of values.
    """
    return (
        capabilities.device_type == "cuda"
        and capabilities.is_ampere_or_later
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
    for purpose, operation, gradient, kernel, reference in _LINEAR_ROWS:
        accelerated, reason = is_accelerated(operation, gradient, capabilities)
        rows.append(
            KernelRow(purpose, kernel if accelerated else reference, reason, _PROVEN[kernel] if accelerated else _CPU)
        )
    return (*rows, *attention_rows(capabilities, dtype))


def attention_rows(capabilities: Capabilities, dtype: torch.dtype) -> tuple[KernelRow, ...]:
    """The part of `kernel_choices` that is about attention."""
    blocks = "blocks of keys, in PyTorch"
    if has_flash_prefill(capabilities, dtype, MAX_FLASH_HEAD_DIM, MAX_FLASH_HEAD_DIM):
        kernel, reason = "PyTorch's flash attention", "a chunk sits at the end of its keys"
    elif capabilities.device_type == "cpu":
        kernel, reason = "PyTorch's flash attention for CPUs", "two segments, merged by log-sum-exp"
    elif capabilities.flash_attention:
        kernel, reason = blocks, "flash attention needs 16 bit and compute capability 8.0"
    else:
        kernel, reason = blocks, "it is off"
    is_cpu = capabilities.device_type == "cpu"
    return (
        KernelRow("prefill, attention", kernel, reason, _CPU if is_cpu or kernel == blocks else "not"),
        KernelRow("decision, attention", blocks, "no gradient of frozen keys and values, and no copy", _CPU),
    )


def kernel_rows(
    card: str | tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[KernelRow, ...]:
    """What would run on a card, with the packages that are installed here.

    Args:
        card: An NVIDIA card, by a name such as `H100` or by its compute capability; None: this machine's card, or its
            CPU.
        dtype: In which the model computes.

    Raises:
        ValueError: No card of this name is known, or its compute capability is not.
    """
    compute_capability = find_card(card).architecture if isinstance(card, str) else card
    if card is not None and compute_capability is None:
        raise ValueError(
            f"The compute capability of {card!r} is not known. Pass it, such as (9, 0), or a card's name."
        )
    if compute_capability is not None:
        return kernel_choices(_with_installed(Capabilities("cuda", compute_capability)), dtype)
    has_card = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_card else torch.device("cpu")
    return kernel_choices(current_capabilities(device), dtype)


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
