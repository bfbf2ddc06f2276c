# SPDX-License-Identifier: Apache-2.0
"""The tokens of a prompt and of a decision, as TRL prepares them for training."""

import json
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from frozen_peft.data.conversation import Context, Message
from frozen_peft.evaluation.candidates import PromptRow
from frozen_peft.evaluation.probes import Probe

__all__ = [
    "TemplateRow",
    "TokenizedDecision",
    "decision_tokens",
    "prompt_tokens",
    "rendered_tokens",
    "row_tools",
    "whole_tokens",
]


@dataclass(frozen=True)
class TokenizedDecision:
    """One decision behind a prompt.

    Attributes:
        prompt: Everything before the decision, the assistant's header included, shape `(tokens,)`, int64.
        decision: Its tokens to the end of the turn, as they are trained, shape `(tokens,)`, int64.
        name: How messages name it.
        diverges: Whether the prompt alone has other tokens than before the decision, which then begins where the two
            part: as it is trained, and not as it is generated.
    """

    prompt: torch.Tensor
    decision: torch.Tensor
    name: str = "decision"
    diverges: bool = False


# What the tokens of a prompt depend on beside it: `tools` and `chat_template_kwargs`, of the row that it is of.
TemplateRow = PromptRow | Probe


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
    tokenizer: PreTrainedTokenizerBase, row: TemplateRow, prompt: Context, decision: str | Message, name: str
) -> TokenizedDecision:
    """A decision behind its prompt, to the end of its turn; the cut is where training has it.

    Args:
        tokenizer: The model's.
        row: The row whose prompt it is, for its tools and its options of the chat template.
        prompt: Its prompt, with instructions or without.
        decision: Its text or, behind messages, the assistant's whole message.
        name: How messages name it.

    Raises:
        ValueError: The decision has no tokens, or the tokenizer nothing to end it with.
    """
    before = _before_decision(tokenizer, row, prompt)
    whole = torch.tensor(whole_tokens(tokenizer, row, prompt, decision), dtype=torch.long)
    length = common_prefix_length(before, whole.tolist())
    if length == len(whole):
        raise ValueError(
            f"{row.place}: the decision {decision!r} has no tokens after its prompt; see the chat template"
        )
    return TokenizedDecision(whole[:length], whole[length:].clone(), name, diverges=length < len(before))


def whole_tokens(
    tokenizer: PreTrainedTokenizerBase, row: TemplateRow, prompt: Context, decision: str | Message
) -> list[int]:
    """Tokens of a prompt and its decision, arguments and errors as of `decision_tokens`."""
    if not isinstance(prompt, str):
        message = {"role": "assistant", "content": decision} if isinstance(decision, str) else decision
        return rendered_tokens(tokenizer, row, [*prompt, message])
    assert isinstance(decision, str), "behind text there are no messages"
    if tokenizer.eos_token is None:
        raise ValueError(f"{row.place}: a prompt of text needs a tokenizer with an `eos_token` to end its decision")
    end = "" if decision.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return tokenizer(prompt + decision + end)["input_ids"]


def row_tools(row: TemplateRow) -> Any:
    """A row's tools as the chat template gets them."""
    tools = row.values.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def rendered_tokens(
    tokenizer: PreTrainedTokenizerBase, row: TemplateRow, messages: list[dict[str, Any]], **options: Any
) -> list[int]:
    """Tokens of messages by the chat template, which gets the `options` too.

    Raises:
        ValueError: The chat template does not render them.
    """
    own = row.values.get("chat_template_kwargs") or {}
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=row_tools(row), return_dict=True, **own, **options)
    except (ValueError, jinja2.TemplateError) as error:
        raise ValueError(f"{row.place}: the chat template does not render its messages: {error}") from error
    return rendered["input_ids"]


def _before_decision(tokenizer: PreTrainedTokenizerBase, row: TemplateRow, prompt: Context) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return rendered_tokens(tokenizer, row, prompt, add_generation_prompt=True)
