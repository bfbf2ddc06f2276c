# SPDX-License-Identifier: Apache-2.0
"""Generated tokens as the row that trains as they were generated.

A row holds text or a message, and training makes tokens of it again. So each form that a candidate may have is put
behind its prompt and rendered as training will, and the first one that gives the generated tokens is taken:

1. Behind messages, what the tokenizer's response template makes of it, where that finds reasoning or calls of tools.
2. Its text, special tokens included.

What ends the turn is no part of either: the template (or TRL, behind text) puts it there, once.
"""

import copy
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import add_response_schema
from trl.chat_template_utils import parse_response

from frozen_peft.data.conversation import Message
from frozen_peft.evaluation.candidates import Candidate, Difference, PromptRow
from frozen_peft.evaluation.decision_tokens import prompt_tokens, row_tools, whole_tokens

__all__ = ["CandidateForms"]


class CandidateForms:
    """Makes candidates of generated tokens.

    Args:
        tokenizer: The model's.
        stop_tokens: Tokens that end a decision.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]):
        self._tokenizer, self._stop_tokens = tokenizer, set(stop_tokens)
        self._parser = _response_parser(tokenizer)
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def candidate(self, row: PromptRow, number: int, tokens: list[int]) -> Candidate:
        """One candidate, in the form that trains as it was generated, or is closest to that.

        Args:
            row: Its prompt.
            number: Its number among the prompt's candidates.
            tokens: What was generated, with the token that ended it if one did.
        """
        prompt = prompt_tokens(self._tokenizer, row, row.prompt)
        text = self.text(tokens)
        messages = [] if isinstance(row.prompt, str) else self._parsed(row, prompt, tokens)
        finish = "stop" if tokens[-1] in self._stop_tokens else "length"
        found: list[Candidate] = []
        for message in (*messages, None):
            differs = self._difference(row, prompt, tokens, text if message is None else message)
            seed = row.seeds[number]
            found.append(Candidate(row.index, number, seed, text, len(tokens), finish, message, differs))
            if differs is None:
                break
        # Of two that are as good, the plain one.
        return min(reversed(found), key=lambda form: (None, "tokens", "text").index(form.differs))

    def text(self, tokens: list[int]) -> str:
        """What was generated, special tokens included, without the token that ended it."""
        own = tokens[:-1] if tokens and tokens[-1] in self._stop_tokens else tokens
        return self._decoded(own)

    def _difference(
        self, row: PromptRow, prompt: list[int], tokens: list[int], decision: str | Message
    ) -> Difference | None:
        try:
            whole = whole_tokens(self._tokenizer, row, row.prompt, decision)
        except ValueError:
            # Of a template that does not render such a message.
            return "text"
        generated = prompt + tokens
        if whole[: len(generated)] == generated:
            return None
        # In other tokens it may take more or fewer of them; what follows the end of the turn is the template's.
        trained = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            return "text"
        if tokens[-1] in self._stop_tokens:
            end = next((place for place, token in enumerate(trained) if token in self._stop_tokens), len(trained))
            if trained[end : end + 1] != tokens[-1:]:
                return "text"
            own, trained = tokens[:-1], trained[:end]
        else:
            # As much of it as was generated: the first tokens that come to a text of that length.
            own, length = tokens, len(self._decoded(tokens))
            sizes = range(len(trained))
            trained = trained[: bisect_left(sizes, length, key=lambda size: len(self._decoded(trained[:size])))]
        # Characters that spell a special token are not that token.
        specials = [[token for token in part if token in self._special] for part in (own, trained)]
        same = self._decoded(own) == self._decoded(trained) and specials[0] == specials[1]
        return "tokens" if same else "text"

    def _parsed(self, row: PromptRow, prompt: list[int], tokens: list[int]) -> list[Message]:
        """The message in a candidate, where it is more than text."""
        if self._parser is None:
            return []
        own = tokens[:-1] if tokens[-1] in self._stop_tokens else tokens
        message: dict[str, Any] = parse_response(self._parser, own, prefix=prompt, tools=row_tools(row))
        return [message] if set(message) - {"role", "content"} else []

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _response_parser(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer with a response template, its own or the one that TRL knows for its chat template, if any."""
    if getattr(tokenizer, "response_template", None) is not None:
        return tokenizer
    try:
        # A copy, since what is set on the tokenizer is saved with it.
        return add_response_schema(copy.copy(tokenizer)) if tokenizer.chat_template is not None else None
    except ValueError:
        return None
