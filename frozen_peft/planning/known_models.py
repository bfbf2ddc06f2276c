# SPDX-License-Identifier: Apache-2.0
"""Configurations by name: of well-known models, which ship here, and of any other that can be loaded.

The shapes, in `known_models.json`, are those of the published `config.json`; what a plan does not depend on (tokens,
rotary bases) is left out. Of vision-language checkpoints it is the text model. `tests/planning/test_models.py` holds
each to its published count.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from frozen_peft.utils.files import read_json

__all__ = ["KNOWN_MODELS", "load_config"]

KNOWN_MODELS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("known_models.json").read_text(encoding="utf-8")
)


def load_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: One of `KNOWN_MODELS`, with or without its owner and in any case; a `config.json` or a folder with one;
            or a hub id.
        revision: Of a model on the hub.
        trust_remote_code: Whether a model's own configuration class may run.

    Raises:
        ValueError: There is no such model, or transformers does not know its family; the message names what is near.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _read(path, trust_remote_code)
    short = {full.split("/")[1].lower(): full for full in KNOWN_MODELS}
    for full, fields in KNOWN_MODELS.items():
        if name.lower() in (full.lower(), full.lower().split("/")[1]):
            return AutoConfig.for_model(**fields)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        near = difflib.get_close_matches(name.split("/")[-1].lower(), short, n=2, cutoff=0.4)
        hint = f" Known without the hub: {', '.join(KNOWN_MODELS)}."
        if near:
            hint = f" Did you mean {' or '.join(short[found] for found in near)}?"
        raise ValueError(
            f"no model {name!r}: no such file, no configuration that ships here, and none on the hub ({reason}).{hint}"
        ) from error


def _read(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    fields = read_json(file)
    if "model_type" not in fields:
        raise ValueError(f"{file} is not the configuration of a model: it has no `model_type`")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        if "model_type" not in str(error) and "model type" not in str(error):
            raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
        return PretrainedConfig(**fields)
