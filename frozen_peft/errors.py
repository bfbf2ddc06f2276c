# SPDX-License-Identifier: Apache-2.0
"""The exceptions a caller may want to catch; everything else is a plain `ValueError` or `TypeError`."""

__all__ = ["ContextMismatchError", "UnsupportedArchitectureError"]


class ContextMismatchError(RuntimeError):
    """A decision computed from a frozen context is not what a plain forward over the whole sequence gives."""


class UnsupportedArchitectureError(ValueError):
    """A model whose projections have no known roles; the message lists the linear modules found in it."""
