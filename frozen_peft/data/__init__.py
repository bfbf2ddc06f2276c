# SPDX-License-Identifier: Apache-2.0
"""Rows as they are written: read exactly, checked with the place of each mistake, kept so on the way to token ids."""

import importlib
from typing import TYPE_CHECKING, Any

from frozen_peft.data.json_text import BYTE_ORDER_MARK, InexactNumber, JsonTextError, inexactness, parse_json

if TYPE_CHECKING:
    from frozen_peft.data.loading import has_split, load_samples
    from frozen_peft.data.stored import (
        as_table,
        has_json_columns,
        needs_python_rows,
        python_row,
        python_rows,
        require_no_dates,
    )

__all__ = [
    "BYTE_ORDER_MARK",
    "InexactNumber",
    "JsonTextError",
    "as_table",
    "has_json_columns",
    "has_split",
    "inexactness",
    "load_samples",
    "needs_python_rows",
    "parse_json",
    "python_row",
    "python_rows",
    "require_no_dates",
]

# Imported at first use: `datasets` takes a second, which commands that only read and write rows need not wait for.
_MODULES = {
    "as_table": "stored",
    "has_json_columns": "stored",
    "has_split": "loading",
    "load_samples": "loading",
    "needs_python_rows": "stored",
    "python_row": "stored",
    "python_rows": "stored",
    "require_no_dates": "stored",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
