# SPDX-License-Identifier: Apache-2.0
"""Which packages are installed."""

import functools
import importlib.metadata

__all__ = ["installed_version"]


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of an installed package, by the name it is installed under; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
