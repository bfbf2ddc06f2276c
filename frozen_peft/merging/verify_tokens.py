# SPDX-License-Identifier: Apache-2.0
"""Prompts and samples that a merged model is verified on, as tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl.data_utils import common_prefix_length

from frozen_peft.data import split_sample

__all__ = ["PROMPTS", "SampleTokens", "load_tokenizer", "prompt_tokens", "sample_tokens"]

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Please summarize what we agreed on so far.",
)
"""What is decided for where no prompts and no samples are given."""


@dataclass(frozen=True)
class SampleTokens:
    """A sample: int64[tokens], and how many of them are its context."""

    ids: torch.Tensor
    num_context: int


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The merged model's tokenizer; None where it has none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def prompt_tokens(tokenizer: Any, prompt: Any, vocab_size: int) -> torch.Tensor:
    """A text or messages as tokens; one of `PROMPTS` becomes random tokens where there is no tokenizer."""
    if tokenizer is None:
        if prompt not in PROMPTS:
            raise ValueError("Prompts need a tokenizer, and neither base nor adapter has one.")
        # Any tokens tell two models apart.
        generator = torch.Generator().manual_seed(PROMPTS.index(prompt))
        return torch.randint(vocab_size, (24,), generator=generator)
    if isinstance(prompt, list):
        return _rendered(tokenizer, prompt, add_generation_prompt=True)
    return _ids(tokenizer(prompt))


def sample_tokens(tokenizer: Any, sample: dict[str, Any], number: int) -> SampleTokens:
    """A sample as TRL tokenizes it."""
    if tokenizer is None:
        raise ValueError("Samples need a tokenizer, and neither base nor adapter has one.")
    try:
        split = split_sample(sample)
    except ValueError as error:
        raise ValueError(f"Sample {number}: {error}") from error
    prompt, decision = split.context, split.decision or ""
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        context = _ids(tokenizer(prompt))
        whole = _ids(tokenizer(prompt + decision + ("" if decision.endswith(end) else end)))
    else:
        context = _rendered(tokenizer, prompt, add_generation_prompt=True)
        whole = _rendered(tokenizer, [*prompt, *decision])
    num_context = common_prefix_length(context.tolist(), whole.tolist())
    if not 0 < num_context < len(whole):
        raise ValueError(f"Sample {number} has no decision after a context of at least one token.")
    return SampleTokens(whole, num_context)


def _rendered(tokenizer: Any, messages: list[Any], **options: Any) -> torch.Tensor:
    if tokenizer.chat_template is None:
        raise ValueError("Samples of messages need a chat template, and neither base nor adapter has one.")
    return _ids(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options))


def _ids(encoded: Any) -> torch.Tensor:
    return torch.tensor(encoded["input_ids"], dtype=torch.long)
