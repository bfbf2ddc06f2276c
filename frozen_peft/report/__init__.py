# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, and the one HTML file that shows it."""

import importlib
from typing import TYPE_CHECKING, Any

from frozen_peft.report.secrecy import is_secret, without_secrets

if TYPE_CHECKING:
    from frozen_peft.report.examples import ExampleSettings, make_examples
    from frozen_peft.report.memory import PeakMemory
    from frozen_peft.report.page import render_page, write_page, write_report
    from frozen_peft.report.record import versions, write_json, write_recipe
    from frozen_peft.report.run_folder import read_run_folder

__all__ = [
    "ExampleSettings",
    "PeakMemory",
    "is_secret",
    "make_examples",
    "read_run_folder",
    "render_page",
    "versions",
    "without_secrets",
    "write_json",
    "write_page",
    "write_recipe",
    "write_report",
]

# Imported at first use: torch and matplotlib take seconds.
_MODULES = {
    "ExampleSettings": "examples",
    "PeakMemory": "memory",
    "make_examples": "examples",
    "read_run_folder": "run_folder",
    "render_page": "page",
    "versions": "record",
    "write_json": "record",
    "write_page": "page",
    "write_recipe": "record",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
