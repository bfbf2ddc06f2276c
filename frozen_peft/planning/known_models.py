# SPDX-License-Identifier: Apache-2.0
"""Configurations by name: of well-known models, which ship here, and of any other that can be loaded.

The shapes are those of the published `config.json`; what a plan does not depend on (tokens, rotary bases) is left out.
Of vision-language checkpoints it is the text model. `tests/planning/test_models.py` holds each to its published count.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

__all__ = ["KNOWN_MODELS", "load_config"]

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3.5-27B": {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.1-70B-Instruct": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}


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
    known = {full.lower(): full for full in KNOWN_MODELS}
    known |= {full.split("/")[1].lower(): full for full in KNOWN_MODELS}
    if (found := known.get(name.lower())) is not None:
        fields = KNOWN_MODELS[found]
        return AutoConfig.for_model(**fields)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        near = _near(name)
        hint = f" Did you mean {' or '.join(near)}?" if near else f" Known without the hub: {', '.join(KNOWN_MODELS)}."
        raise ValueError(
            f"no model {name!r}: no such file, no configuration that ships here, and none on the hub ({reason}).{hint}"
        ) from error


def _read(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} has no config.json")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"{file} is not the configuration of a model: it has no `model_type`")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        if "model_type" not in str(error) and "model type" not in str(error):
            raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error
        return PretrainedConfig(**fields)


def _near(name: str) -> list[str]:
    """Known names that are like this one, nearest first."""
    short = {full.split("/")[1].lower(): full for full in KNOWN_MODELS}
    return [short[found] for found in difflib.get_close_matches(name.split("/")[-1].lower(), short, n=2, cutoff=0.4)]
