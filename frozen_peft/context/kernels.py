# SPDX-License-Identifier: Apache-2.0
"""Which kernel a linear-attention layer runs: the one readable place.

transformers binds flash-linear-attention, causal-conv1d and mamba-ssm when a modeling file is imported, if they are
installed. Two things go wrong there. Their kernels need a GPU, so that on a machine without one an installed package
breaks every model that could use it. And some have no right backward:

| kernel | without gradient | with gradient |
| --- | --- | --- |
| any, tensors on a CPU | PyTorch reference | PyTorch reference |
| `chunk_gated_delta_rule`, `chunk_kda` on Hopper, Triton 3.4 up to 3.7.1 | accelerated | PyTorch reference |
| `fused_recurrent_*`, `selective_state_update` (one token at a time) | accelerated | PyTorch reference |
| any other, on a GPU | accelerated | accelerated |

On Hopper, Triton from 3.4 up to 3.7.1 miscompiles the backward of the gated rules (wrong gradients of beta and decay,
flash-linear-attention issue 640), and flash-linear-attention 0.6 refuses to run it. The recurrent kernels have none.

The choice is made at each call by where the tensors are and whether gradient is asked for, in a function that stands
in for transformers' own in the modeling file. It can go when transformers chooses by device itself (5.23.0 does not).
"""

import functools
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

__all__ = ["KernelChoice", "choose_kernels"]

# Packages whose functions transformers binds at import.
KERNEL_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")
HOPPER = (9, 0)
FIRST_TRITON_WITH_WRONG_BACKWARD = Version("3.4")
FIRST_TRITON_WITH_RIGHT_BACKWARD = Version("3.7.1")

Kernel = Callable[..., Any]


class KernelChoice:
    """A kernel function that runs the accelerated kernel or the PyTorch reference, as the table above says.

    Args:
        accelerated: What transformers bound.
        reference: The PyTorch function it wraps.
    """

    def __init__(self, accelerated: Kernel, reference: Kernel):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.accelerated, self.reference = accelerated, reference
        self._parameters = inspect.signature(reference).parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if device.type != "cpu" and (not torch.is_grad_enabled() or has_right_backward(self.name, device)):
            return self.accelerated(*args, **kwargs)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values())
        return self.reference(*args, **{k: v for k, v in kwargs.items() if takes_any or k in self._parameters})


def has_right_backward(name: str, device: torch.device) -> bool:
    """Whether the accelerated kernel of this name has a right backward on this device."""
    if "recurrent" in name or "state_update" in name or "conv1d_update" in name:
        return False
    if "chunk_gated_delta_rule" in name or "chunk_kda" in name:
        return not (
            torch.cuda.get_device_capability(device) == HOPPER
            and FIRST_TRITON_WITH_WRONG_BACKWARD <= _triton_version() < FIRST_TRITON_WITH_RIGHT_BACKWARD
        )
    return True


@functools.cache
def _triton_version() -> Version:
    return Version(importlib.metadata.version("triton"))


def choose_kernels(model: torch.nn.Module) -> list[str]:
    """Puts the choice in place for every modeling file that a model's layers come from.

    Does nothing where none of the packages is installed; calling it again changes nothing.

    Returns:
        Names of the functions for which the choice is in place, such as `modeling_qwen3_5.causal_conv1d_fn`.
    """
    if not any(importlib.util.find_spec(package) for package in KERNEL_PACKAGES):
        return []
    names = {type(module).__module__ for module in model.modules()}
    modeling_files = [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]
    return [name for file in modeling_files for name in _choose_in(file)]


def _choose_in(modeling_file: ModuleType) -> list[str]:
    chosen = []
    for name, function in list(vars(modeling_file).items()):
        if isinstance(function, KernelChoice):
            chosen.append(name)
        elif (reference := _reference_of(function)) is not None:
            setattr(modeling_file, name, KernelChoice(function, reference))
            chosen.append(name)
    return [f"{modeling_file.__name__.rsplit('.', 1)[-1]}.{name}" for name in chosen]


def _reference_of(function: object) -> Kernel | None:
    """The PyTorch function inside what transformers' `use_kernel_func_from_hub_with_fallback` made; else None."""
    if inspect.isfunction(function) and function.__code__.co_filename.endswith("hub_kernels.py"):
        return getattr(function, "__wrapped__", None)
    return None
