# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights: configuration, tokenizer, chat template, generation configuration."""

import json
import shutil
from pathlib import Path
from typing import Any

from frozen_peft.adapters.merge.checkpoint import read_json

__all__ = ["TOKENIZER_FILES", "copy_files", "highest_token", "tokenizer_folder", "write_config"]

# The tokenizer's, which training saves with the adapter: tokens or a template may have been added.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Weights in any form, and what describes the base only.
_LEFT_OUT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite"}
)
_LEFT_OUT = frozenset({"config.json", "README.md", "merge_report.json", "adapter_config.json"})
# Beyond this a file is no configuration.
_MAX_FILE_BYTES = 512 << 20

_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def tokenizer_folder(base: Path, adapter: Path) -> Path:
    """Where the tokenizer is taken from: the adapter's folder if it has one."""
    has_one = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return adapter if has_one and (adapter / "tokenizer_config.json").is_file() else base


def copy_files(base: Path, adapter: Path, target: Path) -> list[str]:
    """Copies what lies beside the base's weights, with the adapter's tokenizer where it has one.

    Folders, weights and what is not a file are left out.

    Returns:
        Names of the files.
    """
    tokenizer = tokenizer_folder(base, adapter)
    sources: dict[str, Path] = {}
    for path in sorted(base.iterdir()):
        left_out = path.name in _LEFT_OUT or path.suffix in _LEFT_OUT_SUFFIXES or path.name.startswith(".")
        if path.name.endswith(".index.json") or left_out or not path.is_file():
            continue
        if tokenizer != base and path.name in TOKENIZER_FILES:
            continue
        if path.stat().st_size <= _MAX_FILE_BYTES:
            sources[path.name] = path
    if tokenizer != base:
        sources.update({name: tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()})
    for name, path in sources.items():
        with path.open("rb") as read, (target / name).open("xb") as written:
            shutil.copyfileobj(read, written)
    return sorted(sources)


def write_config(base: Path, target: Path, *, dtype: str | None, untied: bool, vocab_size: int | None = None) -> None:
    """Writes the base's configuration with what the merge has changed of it; None: it has not."""
    config = read_json(base / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            _settle(part, dtype, untied, is_whole=part is config)
            if vocab_size is not None and ("vocab_size" in part or "text_config" not in config):
                part["vocab_size"] = vocab_size
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settle(part: dict[str, Any], dtype: str | None, untied: bool, *, is_whole: bool) -> None:
    if dtype is not None and (is_whole or "dtype" in part or "torch_dtype" in part):
        part.pop("torch_dtype", None)
        part["dtype"] = _DTYPE_NAMES[dtype]
    if untied and (is_whole or "tie_word_embeddings" in part):
        part["tie_word_embeddings"] = False


def highest_token(adapter: Path) -> int | None:
    """The highest token id of the tokenizer in an adapter's folder; None where it has none that says so.

    Raises:
        ValueError: `tokenizer.json` is not one.
    """
    path = adapter / "tokenizer.json"
    if not path.is_file():
        return None
    values = read_json(path)
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # Unigram models list their tokens, the others number them.
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    ids += [item.get("id") for item in added if isinstance(item, dict)] if isinstance(added, list) else []
    known = [number for number in ids if type(number) is int]
    return max(known, default=None)
