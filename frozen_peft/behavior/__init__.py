# SPDX-License-Identifier: Apache-2.0
"""From instructions in the context to behaviour in the weights: strip, sample, vary, distil, measure."""

from frozen_peft.behavior.rows import Row, read_rows, whole_file

__all__ = ["Row", "read_rows", "whole_file"]
