# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/configuration.md` from the fields of `FrozenContextConfig`, whose `help` is the one source.

python docs/render.py
"""

import dataclasses
from pathlib import Path

from trl import SFTConfig

from frozen_peft import FrozenContextConfig, FrozenContextDPOConfig

PAGE = Path(__file__).parent / "configuration.md"
# What a field's default means where the class has None in its place.
EFFECTIVE_DEFAULTS = {"gradient_horizon": "0"}


def render() -> str:
    """The page as Markdown."""
    inherited = {field.name: field for field in dataclasses.fields(SFTConfig)}
    own = [
        field
        for field in dataclasses.fields(FrozenContextConfig)
        if field.name not in inherited
        or field.default != inherited[field.name].default
        or field.metadata["help"] != inherited[field.name].metadata.get("help")
    ]
    preference = [field for field in dataclasses.fields(FrozenContextDPOConfig) if field.name == "max_length"]
    return (
        "# Configuration\n\n"
        "Made by `python docs/render.py` from the fields' own help; do not edit.\n\n"
        "`FrozenContextConfig` has all fields of TRL's `SFTConfig`. These are added, or have another default or "
        "other values:\n\n"
        f"{_table(own)}\n"
        "`FrozenContextDPOConfig` and `FrozenContextKTOConfig` have all fields of TRL's `DPOConfig` and `KTOConfig`, "
        "those of contexts above (without `distill_...`, and with `decision_mode` at 'tail'), and:\n\n"
        f"{_table(preference)}"
    )


def _table(fields: list[dataclasses.Field]) -> str:
    rows = "\n".join(
        f"| `{field.name}` | `{EFFECTIVE_DEFAULTS.get(field.name, repr(field.default))}` | {field.metadata['help']} |"
        for field in fields
    )
    return f"| field | default | meaning |\n| --- | --- | --- |\n{rows}\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
