# SPDX-License-Identifier: Apache-2.0
"""Turns as inference shows them (`turn_contexts="inference"`): each behind what the chat template renders before it.

1. The *context* of an assistant's message is what a model is given that is about to write it: the messages before it,
   rendered with the generation prompt. Most templates of reasoning models leave out the reasoning of earlier turns
   there, each by its own rule; no rule is known here, the template is asked.
2. The *decision* is what the template adds for the message: reasoning, calls, answer and end of turn.
3. Where the rendering with the message does not begin with the tokens of the one before it, the decision begins where
   the two part, if that is within the generation prompt (which some templates end otherwise where the message has no
   reasoning). Where they part before, the message stands behind another context than inference shows: what it adds is
   then found behind the generation prompt (see `message_rendering`), and follows on what inference shows. Where it is
   not found, the turn is refused.
4. The turns of a conversation are the branches of one row (see `context.branches`); what they share is encoded once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging
from trl import maybe_convert_to_chatml
from trl.data_utils import common_prefix_length, prepare_multimodal_messages

from frozen_peft.data.conversation import Message
from frozen_peft.data.traces import REASONING_FIELDS, Trace, read_trace, reasoning_of
from frozen_peft.training.message_rendering import num_common, rendered_behind_prompt

__all__ = ["Turn", "TurnRenderer", "fields_read", "template_options"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Turn:
    """One turn, rendered.

    Attributes:
        message: Number of the message.
        input_ids: Token ids of context and decision.
        first: Where the decision's supervised tokens begin.
    """

    message: int
    input_ids: list[int]
    first: int


class TurnRenderer:
    """Renders conversations turn by turn.

    Args:
        processing_class: A tokenizer with a chat template, or a processor that has both.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin):
        self._renderer = processing_class
        self._is_processor = isinstance(processing_class, ProcessorMixin)
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._said: set[str] = set()

    def turns(self, row: Mapping[str, Any]) -> list[Turn]:
        """The turns of a row that train.

        Raises:
            ValueError: The row is no such conversation, or a turn cannot be rendered; the message names it.
        """
        row = maybe_convert_to_chatml(dict(row))
        trace, options = read_trace(row), template_options(row)
        shown = [self._shown(trace, index, options) for index in trace.trained]
        wholes = [self._with(trace, index, options) for index in trace.trained]
        tokens = self._tokens([*shown, *wholes])
        turns = []
        for place, index in enumerate(trace.trained):
            before, whole, text = tokens[place], tokens[place + len(shown)], wholes[place]
            first = common_prefix_length(before, whole)
            if first < len(before) and not self._in_prompt(trace, index, options, before, first):
                text = shown[place] + self._own_part(trace, index, options, before[first:])
                (whole,) = self._tokens([text])
                first = common_prefix_length(before, whole)
            if first < len(before):
                self._say_prompt(trace.places[index], before[first:])
            if first == len(whole):
                raise ValueError(f"`{trace.places[index]}` is to train, and the chat template adds nothing for it")
            self._say_dropped(trace, index, text[num_common(shown[place], text) :])
            turns.append(Turn(index, whole, first))
        return turns

    def prompt_tokens(self, messages: list[Message], place: str, options: dict[str, Any]) -> list[int]:
        """Tokens of what a model is shown that is about to answer messages.

        Args:
            messages: The messages.
            place: What errors call them.
            options: Of the template, see `template_options`.

        Raises:
            ValueError: The chat template does not render them.
        """
        (tokens,) = self._tokens([self._text(messages, place, "it", options, prompts=True)])
        return tokens

    def text_tokens(self, text: str) -> list[int]:
        """Tokens of text that no template is applied to, as every sequence begins with them."""
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        return tokens

    def _shown(self, trace: Trace, index: int, options: dict[str, Any]) -> str:
        """What a model is shown that is about to write a message."""
        return self._text(trace.messages[:index], trace.places[index], "what stands before it", options, prompts=True)

    def _with(self, trace: Trace, index: int, options: dict[str, Any]) -> str:
        """The same with the message."""
        return self._text(trace.messages[: index + 1], trace.places[index], "it", options)

    def _text(
        self, messages: list[Message], place: str, what: str, options: dict[str, Any], *, prompts: bool = False
    ) -> str:
        """What the template makes of messages, with the generation prompt where it `prompts`."""
        try:
            if self._is_processor:
                # As TRL does, for templates that know content in parts alone.
                messages = prepare_multimodal_messages(messages)
            text = self._renderer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompts, **options
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"`{place}`: the chat template does not render {what}: {error}") from error
        assert isinstance(text, str)
        return text

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """As `apply_chat_template` makes them; in one call, which tokenizers spread over threads."""
        tokens: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return tokens

    def _in_prompt(self, trace: Trace, index: int, options: dict[str, Any], before: list[int], first: int) -> bool:
        """Whether a token of what inference shows is of the generation prompt."""
        place = trace.places[index]
        (without,) = self._tokens([self._text(trace.messages[:index], place, "what stands before it", options)])
        return first >= common_prefix_length(without, before)

    def _own_part(self, trace: Trace, index: int, options: dict[str, Any], rest: list[int]) -> str:
        """What the template renders of a message, where what it makes of those before parts from what inference shows.

        Args:
            trace: The conversation.
            index: Number of the message.
            options: Of the template.
            rest: Tokens of what inference shows from there on.

        Raises:
            ValueError: It is not found.
        """
        place = trace.places[index]

        def render(messages: Sequence[Message], prompts: bool) -> str:
            return self._text(list(messages), place, "what stands around it", options, prompts=prompts)

        text = rendered_behind_prompt(render, trace.messages, index)
        if text is None:
            raise ValueError(
                f"`{place}` is to train, and with it the chat template renders what stands before it in another way, "
                f"from {self._tokenizer.decode(rest[:20])!r} on, before the generation prompt. So nothing that "
                'inference shows is followed by it. Say `"train": false` in it, use another chat template, or set '
                "`turn_contexts='training'`."
            )
        return text

    def _say_prompt(self, place: str, rest: list[int]) -> None:
        """Warns of an end of the generation prompt that a turn is not rendered with."""
        self._say(
            "prompt",
            f"The generation prompt ends in {self._tokenizer.decode(rest)!r}, and the chat template does not render "
            f"that in `{place}`: the decision begins before it. Inference shows it, unless `chat_template_kwargs` say "
            "otherwise (`enable_thinking`, for many templates).",
        )

    def _say_dropped(self, trace: Trace, index: int, part: str) -> None:
        """Warns where not even the turn itself has its reasoning or its calls."""
        place, message = trace.places[index], trace.messages[index]
        reasoning = reasoning_of(message)
        if reasoning is not None and reasoning[1] not in part:
            fields = [f"`{name}`" for name in fields_read(str(self._renderer.chat_template))]
            self._say(
                "reasoning",
                f"The chat template does not render the `{reasoning[0]}` of `{place}`, not even in the turn that "
                "trains it: the model learns to answer without. The template reads "
                f"{', '.join(fields) or 'no such field'}.",
            )
        calls = [call.get("function") or call for call in message.get("tool_calls", ())]
        if any(call["name"] not in part for call in calls):
            self._say(
                "calls",
                f"The chat template does not render the `tool_calls` of `{place}`: the model learns to end its turn "
                "without them. Use a template that knows tools, or write the calls into `content`.",
            )

    def _say(self, subject: str, text: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            logger.warning(f"{text} This is said once and may hold for other turns.")


def fields_read(chat_template: str) -> list[str]:
    """The fields that a chat template reads reasoning from; transformers 5.24 hands it each under all names it has."""
    return [name for name in REASONING_FIELDS if re.search(rf"[.'\"]{name}\b", chat_template)]


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets of a row beside its messages."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}
