# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint with a tokenizer and a chat template, in a folder as a user would have it."""

from pathlib import Path
from typing import Any

from tests.documentation.tokenizer import train_tokenizer
from tests.tiny_models import tiny_model

TEXT = "Take the left road. I would rather take the right road. The facts are noted in the book of facts. " * 4


def write_checkpoint(folder: Path, name: str = "qwen3_5_text", **generation: Any) -> Path:
    """Writes model and tokenizer; `generation` goes into its generation configuration."""
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    model = tiny_model(name, vocab_size=len(tokenizer))
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
