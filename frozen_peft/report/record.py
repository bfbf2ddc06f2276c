# SPDX-License-Identifier: Apache-2.0
"""What a run writes of itself beside its weights: its recipe, what it ran on, the memory it took."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from frozen_peft.report.secrecy import without_secrets
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.installed import installed_version

__all__ = ["versions", "write_json", "write_recipe"]

_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
_RECIPE_HEAD = """\
# What this run was trained with: every field that its recipe and its command line gave. Paths are those of the folder
# in which it was started.
#
#   frozen-peft train recipe.yaml
"""


def write_recipe(path: Path, fields: dict[str, Any]) -> None:
    """Writes a run's settings as a recipe, without secrets, whole or not at all.

    Args:
        path: The file.
        fields: Names and values as `RecipeParser.given` has them.
    """
    kept, left_out = without_secrets(fields)
    lines = [f"#\n# Secret, and so to be given again: {', '.join(left_out)}\n"] if left_out else []
    with whole_file(path) as file:
        file.write(_RECIPE_HEAD)
        file.writelines(lines)
        file.write("\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=119))


def versions() -> dict[str, str | None]:
    """The content of `versions.json`: what the run ran with; null for a library that is not installed."""
    found: dict[str, str | None] = {"frozen_peft": installed_version("frozen-peft")}
    found |= {name: installed_version(name) for name in _LIBRARIES}
    return found | {"python": platform.python_version(), "device": _device()}


def write_json(path: Path, values: Any) -> None:
    """Writes JSON, whole or not at all."""
    with whole_file(path) as file:
        # Escaped, so that half a surrogate pair in a sample does no harm.
        json.dump(values, file, indent=1, allow_nan=False)
        file.write("\n")


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        return str(accelerator)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
