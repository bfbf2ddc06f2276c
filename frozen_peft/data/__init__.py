# SPDX-License-Identifier: Apache-2.0
"""Rows and conversations: read exactly and checked, stripped of instructions, varied, on the way to token ids."""

import importlib
from typing import TYPE_CHECKING, Any

from frozen_peft.data.conversation import Split, message_texts, sample_problem, split_sample, with_context
from frozen_peft.data.json_text import BYTE_ORDER_MARK, InexactNumber, JsonTextError, inexactness, parse_json
from frozen_peft.data.marks import DEFAULT_MARKS, Marks
from frozen_peft.data.paraphrases import Paraphrases
from frozen_peft.data.rows import Row, read_rows
from frozen_peft.data.strip_file import StripSettings, StripSummary, strip_file
from frozen_peft.data.stripping import QuotedInstructionError, restore_instructions, strip_instructions
from frozen_peft.data.variant_files import read_paraphrases, read_units
from frozen_peft.data.variants import DEFAULT_INDEPENDENT, VariantSettings, vary_context

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
    "DEFAULT_INDEPENDENT",
    "DEFAULT_MARKS",
    "InexactNumber",
    "JsonTextError",
    "Marks",
    "Paraphrases",
    "QuotedInstructionError",
    "Row",
    "Split",
    "StripSettings",
    "StripSummary",
    "VariantSettings",
    "as_table",
    "has_json_columns",
    "has_split",
    "inexactness",
    "load_samples",
    "message_texts",
    "needs_python_rows",
    "parse_json",
    "python_row",
    "python_rows",
    "read_paraphrases",
    "read_rows",
    "read_units",
    "require_no_dates",
    "restore_instructions",
    "sample_problem",
    "split_sample",
    "strip_file",
    "strip_instructions",
    "vary_context",
    "with_context",
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
