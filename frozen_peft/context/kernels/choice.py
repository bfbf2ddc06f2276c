# SPDX-License-Identifier: Apache-2.0
"""Puts the choice of kernels in place that `kernels.table` says.

transformers binds flash-linear-attention, causal-conv1d and mamba-ssm when a modeling file is imported, if they are
installed. Two things go wrong there: their kernels need a GPU, so that on a machine without one an installed package
breaks every model that could use it; and some have no right backward.

The choice is made at each call by where the tensors are and whether gradient is asked for, in a function that stands
in for transformers' own in the modeling file.
"""

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
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
from frozen_peft.utils.compat.transformers import replace_kernels

__all__ = ["choose_kernels", "kernel_choice"]

logger = logging.getLogger(__name__)

Kernel = Callable[..., Any]


def choose_kernels(model: torch.nn.Module, *, always: bool = False) -> None:
    """Puts the choice in place for every modeling file that a model's layers come from.

    Does nothing where none of the packages is installed; calling it again changes nothing.

    Args:
        model: Whose modeling files are meant.
        always: Also where none of the packages is installed and there is nothing to choose.
    """
    if always or any(importlib.util.find_spec(module) for module in KERNEL_MODULES):
        for name in {type(module).__module__ for module in model.modules()}:
            if name.startswith("transformers.models."):
                replace_kernels(sys.modules[name], kernel_choice)


def kernel_choice(accelerated: Kernel, reference: Kernel, kernel: str, package: str) -> Kernel:
    """A function that runs the accelerated kernel or the PyTorch reference, as the table says.

    Args:
        accelerated: What transformers bound.
        reference: The PyTorch function it wraps.
        kernel: Name of the kernel, such as `chunk_kda`.
        package: Module that it is of, such as `fla`. Of another than the table knows the reference runs.
    """
    operation = operation_of(kernel, package)
    if operation is None:
        return reference
    parameters = inspect.signature(reference).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())

    @uncompiled
    @functools.wraps(reference)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if _is_accelerated(operation, torch.is_grad_enabled(), device):
            return accelerated(*args, **kwargs)
        return reference(*args, **{k: v for k, v in kwargs.items() if takes_any or k in parameters})

    return chosen


@functools.cache
def _is_accelerated(operation: Operation, gradient: bool, device: torch.device) -> bool:
    accelerated, reason = is_accelerated(operation, gradient, current_capabilities(device))
    if not accelerated and device.type != "cpu":
        # Cached, so it is said once.
        mode = "with" if gradient else "without"
        logger.warning("The %s %s gradient runs PyTorch's reference, which is slower: %s.", operation, mode, reason)
    return accelerated
