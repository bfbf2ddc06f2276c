# SPDX-License-Identifier: Apache-2.0
"""What lies beside the weights: configuration, tokenizer, chat template, generation configuration."""

import json
import shutil
from pathlib import Path
from typing import Any

from frozen_peft.adapters.tokenizers import TEMPLATE_FILES, TOKENIZER_FILES, has_tokenizer, own_template
from frozen_peft.merging.source import read_json

__all__ = ["copy_files", "highest_token", "write_config"]

# Weights in any form, and what describes the base only.
_LEFT_OUT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite"}
)
_LEFT_OUT = frozenset({"config.json", "README.md", "merge_report.json", "adapter_config.json"})
# Beyond this a file is no configuration.
_MAX_FILE_BYTES = 512 << 20

_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def copy_files(base: Path, adapter: Path, target: Path) -> list[str]:
    """Copies what lies beside the base's weights, with the tokenizer and the chat template that count.

    Folders, weights and what is not a file are left out.

    Returns:
        Names of the files.
    """
    sources: dict[str, Path] = {}
    for path in sorted(base.iterdir()):
        left_out = path.name in _LEFT_OUT or path.suffix in _LEFT_OUT_SUFFIXES or path.name.startswith(".")
        if path.name.endswith(".index.json") or left_out or not path.is_file():
            continue
        if path.stat().st_size <= _MAX_FILE_BYTES:
            sources[path.name] = path
    if has_tokenizer(adapter):
        sources = {name: path for name, path in sources.items() if name not in TOKENIZER_FILES}
        sources |= {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    template = own_template(adapter) if not has_tokenizer(adapter) else None
    if has_tokenizer(adapter) and own_template(adapter) is None:
        template = own_template(base)
    if template is not None:
        # Beside a tokenizer of another folder, in the file that wins over its configuration.
        sources = {name: path for name, path in sources.items() if name not in TEMPLATE_FILES}
        (target / TEMPLATE_FILES[0]).write_text(template, encoding="utf-8")
    for name, path in sources.items():
        with path.open("rb") as read, (target / name).open("xb") as written:
            shutil.copyfileobj(read, written)
    return sorted(sources if template is None else {*sources, TEMPLATE_FILES[0]})


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
