# SPDX-License-Identifier: Apache-2.0
"""What stays of a context's beginning where its oldest tokens are dropped.

A model that is given a beginning-of-sequence token in inference has never seen a sequence without it, and may be
another one there: attention rests on it. So it always stays. A system message may stay too, or a number of tokens.

Both are found in a sample's tokens, wherever they come from: the beginning-of-sequence token by what the tokenizer
begins a text with, a system message by what the chat template writes before and behind one.
"""

from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

__all__ = ["NO_START", "ContextStart", "SystemMessage", "find_start"]

SYSTEM = "system"
# The contents of messages that stand for any other.
_CONTENT, _OTHER_CONTENT = "0123456789", "9876543210"


@dataclass(frozen=True)
class SystemMessage:
    """How a system message is told from others by its tokens.

    Attributes:
        first: What it begins with and a user's message does not, behind what every sequence begins with.
        last: What it ends with; the first of these tokens is in no text. Empty: it ends where another one begins.
        others: What messages of other roles begin with, each in no text.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    others: tuple[int, ...] = ()

    def stop(self, tokens: list[int], start: int) -> int:
        """Where the system message ends that begins at a place; the place itself where none does."""
        inside = start + len(self.first)
        if tuple(tokens[start:inside]) != self.first:
            return start
        ends = self.last[:1] or self.others
        end = next((place for place in range(inside, len(tokens)) if tokens[place] in ends), None)
        if end is None:
            return start
        return end + (len(self.last) if tuple(tokens[end : end + len(self.last)]) == self.last else 1)


@dataclass(frozen=True)
class ContextStart:
    """What stays of the beginning of a context.

    Attributes:
        openings: What a sequence may begin with, each one token or a few; what it does begin with stays.
        num_tokens: So many tokens stay.
        system: A system message stays, known by this; None: not as such.
    """

    openings: tuple[tuple[int, ...], ...] = ()
    num_tokens: int = 0
    system: SystemMessage | None = None

    def length(self, context: np.ndarray) -> int:
        """Tokens that stay of the beginning of a context `(tokens,)`."""
        longest = max((len(opening) for opening in self.openings), default=0)
        first = context[:longest].tolist()
        length = max((len(each) for each in self.openings if tuple(first[: len(each)]) == each), default=0)
        if self.system is not None:
            length = self.system.stop(context.tolist(), length)
        return min(max(length, self.num_tokens), len(context))


NO_START = ContextStart()


def find_start(tokenizer: PreTrainedTokenizerBase, keep: str) -> ContextStart:
    """What is to stay with a tokenizer.

    Args:
        tokenizer: With a chat template, where a system message is to stay.
        keep: `"system"`, or a number of tokens.

    Raises:
        ValueError: The chat template has no system message that could be told from what follows it.
    """
    openings = _openings(tokenizer)
    if keep != SYSTEM:
        return ContextStart(openings, int(keep))
    return ContextStart(openings, system=_system_message(tokenizer, openings))


def _openings(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    bos = tokenizer.bos_token_id
    found = {(bos,)} if bos is not None else set()
    plain = tokenizer(_CONTENT, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_CONTENT)["input_ids"]
    places = [place for place in range(1, len(whole)) if whole[place : place + len(plain)] == plain]
    if plain and places:
        found.add(tuple(whole[: places[0]]))
    return tuple(sorted(found))


def _system_message(tokenizer: PreTrainedTokenizerBase, openings: tuple[tuple[int, ...], ...]) -> SystemMessage:
    has_template = tokenizer.chat_template is not None
    around = _around_system(tokenizer) if has_template else None
    before_user = _rendered(tokenizer, user=_CONTENT) if has_template else None
    if around is None or before_user is None:
        raise ValueError(
            "`keep_context_start='system'` keeps a system message, and this tokenizer's chat template, if any, writes "
            "none that stands by itself (some put it into the user's message). Set a number of tokens to keep, such "
            "as `keep_context_start: 64`."
        )
    first, last = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in around)
    other = tokenizer(before_user.partition(_CONTENT)[0], add_special_tokens=False)["input_ids"]
    differ = next((index for index, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), len(first))
    # What is in no text: a template's own words may come before it.
    ends = [place for place, token in enumerate(last) if token in tokenizer.added_tokens_decoder]
    last = last[ends[0] :] if ends else []
    others = [token for token in other[differ : differ + 1] if token in tokenizer.added_tokens_decoder]
    if not last and not others:
        raise ValueError(
            "`keep_context_start='system'` keeps a system message, and this tokenizer's chat template ends one with "
            f"{around[1]!r}, which may be in its text as well. Set a number of tokens to keep instead, such as "
            "`keep_context_start: 64`."
        )
    # Where the template writes a system message of its own, a user's message begins with one; what comes last may
    # become one token with the text.
    first = first[: differ + 1] if differ < len(first) else first[: max(len(first) - 1, 1)]
    opening = ContextStart(openings).length(np.asarray(first))
    return SystemMessage(tuple(first[opening:]), tuple(last), tuple(others))


def _around_system(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Text before and behind the content of a system message; None where there is no saying."""
    alone = _rendered(tokenizer, system=_CONTENT)
    if alone is not None:
        before, _, behind = alone.partition(_CONTENT)
        return before, behind
    # Templates that want a user's message: what they write between the two, up to what begins the second.
    text = _rendered(tokenizer, system=_CONTENT, user=_OTHER_CONTENT)
    if text is None:
        return None
    before, _, rest = text.partition(_CONTENT)
    between, has_user, _ = rest.partition(_OTHER_CONTENT)
    special = sorted(place for token in map(str, tokenizer.added_tokens_decoder.values())
                     if (place := between.rfind(token)) >= 0)  # fmt: skip
    return (before, between[: special[-1]]) if has_user and len(special) > 1 else None


def _rendered(tokenizer: PreTrainedTokenizerBase, **contents: str) -> str | None:
    """Messages, by their roles; None where the template does not write each of them, and once."""
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return None
    assert isinstance(text, str)
    return text if all(text.count(content) == 1 for content in contents.values()) else None
