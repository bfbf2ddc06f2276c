# SPDX-License-Identifier: Apache-2.0
"""The former name of what `data` (rows, stripping, variants) and `evaluation` (probes, sampling) hold now."""

from typing import Any

from frozen_peft import data, evaluation

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    return getattr(data if name in data.__all__ else evaluation, name)
