# SPDX-License-Identifier: Apache-2.0
"""Puts the choice of kernels in place that `kernel_table` says.

transformers binds flash-linear-attention, causal-conv1d and mamba-ssm when a modeling file is imported, if they are
installed. Two things go wrong there: their kernels need a GPU, so that on a machine without one an installed package
breaks every model that could use it; and some have no right backward.

The choice is made at each call by where the tensors are and whether gradient is asked for, in a function that stands
in for transformers' own in the modeling file. It can go when transformers chooses by device itself (5.23.0 does not).
"""

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from frozen_peft.context.handover import uncompiled
from frozen_peft.context.kernels.table import (
    KERNEL_MODULES,
    Operation,
    current_capabilities,
    is_accelerated,
    operation_of,
)

__all__ = ["KernelChoice", "choose_kernels"]

logger = logging.getLogger(__name__)

Kernel = Callable[..., Any]


class KernelChoice:
    """A kernel function that runs the accelerated kernel or the PyTorch reference, as the table says.

    Args:
        accelerated: What transformers bound.
        reference: The PyTorch function it wraps.
    """

    def __init__(self, accelerated: Kernel, reference: Kernel):
        functools.update_wrapper(self, reference)
        self.operation: Operation = operation_of(reference.__name__)
        self.accelerated, self.reference = accelerated, reference
        self._parameters = inspect.signature(reference).parameters

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if _is_accelerated(self.operation, torch.is_grad_enabled(), device):
            return self.accelerated(*args, **kwargs)
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values())
        return self.reference(*args, **{k: v for k, v in kwargs.items() if takes_any or k in self._parameters})


@functools.cache
def _is_accelerated(operation: Operation, gradient: bool, device: torch.device) -> bool:
    accelerated, reason = is_accelerated(operation, gradient, current_capabilities(device))
    if not accelerated and device.type != "cpu":
        # Cached, so it is said once.
        mode = "with" if gradient else "without"
        logger.warning("The %s %s gradient runs PyTorch's reference, which is slower: %s.", operation, mode, reason)
    return accelerated


def choose_kernels(model: torch.nn.Module, *, always: bool = False) -> list[str]:
    """Puts the choice in place for every modeling file that a model's layers come from.

    Does nothing where none of the packages is installed; calling it again changes nothing.

    Args:
        model: Whose modeling files are meant.
        always: Also where none of the packages is installed and there is nothing to choose.

    Returns:
        Names of the functions for which the choice is in place, such as `modeling_qwen3_5.causal_conv1d_fn`.
    """
    if not always and not any(importlib.util.find_spec(module) for module in KERNEL_MODULES):
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
