# SPDX-License-Identifier: Apache-2.0
"""From instructions in the context to behaviour in the weights: strip, sample, vary, distil, measure."""

from frozen_peft.behavior.conversation import Split, message_texts, sample_problem, split_sample, with_context
from frozen_peft.behavior.marks import DEFAULT_MARKS, Marks
from frozen_peft.behavior.rows import Row, read_rows, whole_file
from frozen_peft.behavior.strip import QuotedInstructionError, restore_instructions, strip_instructions

__all__ = [
    "DEFAULT_MARKS",
    "Marks",
    "QuotedInstructionError",
    "Row",
    "Split",
    "message_texts",
    "read_rows",
    "restore_instructions",
    "sample_problem",
    "split_sample",
    "strip_instructions",
    "whole_file",
    "with_context",
]
