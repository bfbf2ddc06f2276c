# SPDX-License-Identifier: Apache-2.0
"""PLACEHOLDER."""

from pathlib import Path
from typing import Any


def write_page(results: dict[str, Any], path: Path) -> None:
    path.write_text("")
