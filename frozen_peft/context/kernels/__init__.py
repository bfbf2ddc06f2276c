# SPDX-License-Identifier: Apache-2.0
"""Which kernels linear attention runs on: one table of what is exact where, and the choice by it."""

from frozen_peft.context.kernels.choice import choose_kernels
from frozen_peft.context.kernels.table import (
    KERNEL_MODULES,
    current_capabilities,
    is_accelerated,
    kernel_choices,
    kernel_rows,
)

__all__ = [
    "KERNEL_MODULES",
    "choose_kernels",
    "current_capabilities",
    "is_accelerated",
    "kernel_choices",
    "kernel_rows",
]
