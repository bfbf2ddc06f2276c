# SPDX-License-Identifier: Apache-2.0
"""The tokens of a prompt and of a decision, as TRL prepares them for training."""

import json
from typing import Any, Protocol

import jinja2
from transformers import PreTrainedTokenizerBase
from trl.data_utils import _tokenize, common_prefix_length

from frozen_peft.behavior.conversation import Context

__all__ = ["TemplateRow", "decision_tokens", "prompt_tokens", "rendered_tokens", "stop_tokens"]


class TemplateRow(Protocol):
    """What the tokens of a row's prompt depend on beside the prompt."""

    @property
    def values(self) -> dict[str, Any]:
        """The row's fields, of which `tools` and `chat_template_kwargs` go to the chat template."""

    @property
    def place(self) -> str:
        """Where the row is, for messages."""


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, row: TemplateRow, prompt: Context) -> list[int]:
    """Tokens that a decision follows on, the assistant's header included.

    Args:
        tokenizer: The model's.
        row: The row whose prompt it is, for its tools and its options of the chat template.
        prompt: Its prompt, with instructions or without.

    Raises:
        ValueError: It has no tokens, or the chat template does not render it.
    """
    tokens = _before_decision(tokenizer, row, prompt)
    if not tokens:
        raise ValueError(f"{row.place}: `prompt` has no tokens")
    return tokens


def decision_tokens(
    tokenizer: PreTrainedTokenizerBase, row: TemplateRow, prompt: Context, text: str
) -> tuple[list[int], list[int]]:
    """Tokens before a decision, and the decision's own to the end of its turn; the cut is where training has it.

    Raises:
        ValueError: The decision has no tokens, or the tokenizer nothing to end it with.
    """
    before = _before_decision(tokenizer, row, prompt)
    if isinstance(prompt, str):
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{row.place}: a prompt of text needs a tokenizer with an `eos_token` to end its decision"
            )
        end = "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token
        whole = _tokenize(tokenizer, prompt + text + end)["input_ids"]
    else:
        whole = rendered_tokens(tokenizer, row, [*prompt, {"role": "assistant", "content": text}])
    length = common_prefix_length(before, whole)
    if length == len(whole):
        raise ValueError(f"{row.place}: the decision {text!r} has no tokens after its prompt; see the chat template")
    return whole[:length], whole[length:]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Tokens that end a decision: those of the checkpoint's generation configuration and the tokenizer's own.

    Raises:
        ValueError: There are none.
    """
    configured = generation_config.eos_token_id if generation_config is not None else None
    tokens = list(configured) if isinstance(configured, list | tuple) else [configured]
    found = list(dict.fromkeys(token for token in (*tokens, tokenizer.eos_token_id) if token is not None))
    if not found:
        raise ValueError("neither the tokenizer nor the generation configuration has a token that ends a decision")
    return found


def rendered_tokens(
    tokenizer: PreTrainedTokenizerBase, row: TemplateRow, messages: list[dict[str, Any]], **options: Any
) -> list[int]:
    """Tokens of messages by the chat template, which gets the `options` too.

    Raises:
        ValueError: The chat template does not render them.
    """
    tools = row.values.get("tools")
    try:
        return _tokenize(
            tokenizer,
            messages,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **(row.values.get("chat_template_kwargs") or {}),
            **options,
        )["input_ids"]
    except (ValueError, jinja2.TemplateError) as error:
        raise ValueError(f"{row.place}: the chat template does not render its messages: {error}") from error


def _before_decision(tokenizer: PreTrainedTokenizerBase, row: TemplateRow, prompt: Context) -> list[int]:
    if isinstance(prompt, str):
        return _tokenize(tokenizer, prompt)["input_ids"]
    return rendered_tokens(tokenizer, row, prompt, add_generation_prompt=True)
