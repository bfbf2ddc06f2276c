# SPDX-License-Identifier: Apache-2.0
"""Packages whose names are imported at first use, so that what needs no torch does not wait for it."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["lazy_package"]


def lazy_package(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[dict[str, str], list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """What a package needs to import its names at first use.

    Args:
        package: Its `__name__`.
        modules: Names that it offers, by the module that has them. None may be that of a module too, which would hide
            it once that is imported.

    Returns:
        The module of each name, and the package's `__all__`, `__getattr__` and `__dir__`.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    names = sorted(module_of)
    return module_of, names, load, lambda: names
