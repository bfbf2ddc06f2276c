# SPDX-License-Identifier: Apache-2.0
"""Instruction stripping: the marked guidance goes out of a context, the decision stays as it is.

1. *What goes.* Exactly what the marks cover in the context with its instructions, character for character. White space
   around a stretch stays unless `tidy`. A message of whose texts only white space is left goes as a whole.
2. *Where marks look.* At the context alone, and always at the whole one: pieces that were stripped before are put back
   first and stripped again with the rest. So stripping twice with the same marks is stripping once, and other marks
   add to what is stripped already, in whatever order they come.
3. *What is kept.* The pieces, in the column `stripped` (`data.pieces`), from which `restore_instructions` gives
   the exact sample before.
4. *What is refused.* A decision that quotes what was stripped: trained on it, a model would learn to say what it can
   no longer read.
"""

from typing import Any

from frozen_peft.data.conversation import message_texts, split_sample, with_context
from frozen_peft.data.marks import DEFAULT_MARKS, Marks, Stretch, merged
from frozen_peft.data.pieces import (
    STRIPPED,
    MarkedMessage,
    marked_context,
    piece_texts,
    stripped_context,
)
from frozen_peft.data.quotes import find_quote

__all__ = ["QuotedInstructionError", "restore_instructions", "strip_instructions"]

# Where a row's decisions stand: a sample's, and those of a pair or a probe that are wanted.
_DECISION_COLUMNS = ("completion", "chosen", "preferred", "expected")

# What a message may hold beside its text that makes it one without text.
_OTHER_MATTER = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")


class QuotedInstructionError(ValueError):
    """A decision quotes the guidance that was stripped from its context."""


def strip_instructions(
    sample: dict[str, Any],
    marks: Marks = DEFAULT_MARKS,
    *,
    tidy: bool = False,
    allow_quotes: bool = False,
    quote_words: int = 5,
) -> dict[str, Any]:
    """Removes marked guidance from a sample's context.

    Args:
        sample: A row of any form that `data.conversation` lists; it may have been stripped before.
        marks: What is guidance; by default `<instruction>` tags, and messages with `"instruction": true`.
        tidy: Also remove one of the two runs of white space that meet where a stretch was: the one with fewer line
            breaks, else the shorter, else the second; both at the start and at the end of a text.
        allow_quotes: Accept a decision that quotes what was stripped.
        quote_words: A decision quotes a removed text if so many of its words in a row occur in it, or all of the words
            of a shorter one of at least three. Words are runs of letters and digits, whatever their case; in scripts
            that write no spaces, each character is one.

    Returns:
        A new row with the same columns and `stripped`, an empty list where nothing was marked. Its decision is the
        sample's own object.

    Raises:
        QuotedInstructionError: The decision quotes what was stripped.
        ValueError: The row is no sample, its tags are unbalanced, its `stripped` does not fit it, nothing would be
            left of its context, or it is text and the marks are all of messages.
    """
    if quote_words < 1:
        raise ValueError(f"`quote_words` is {quote_words}, expected 1 or more")
    split = split_sample(sample)
    is_text = isinstance(split.context, str)
    if is_text and not marks.reach_into_text:
        raise ValueError(f"`{split.column}` is text, and no mark reaches into text: give a tag or a pattern")
    marked = [
        _mark(entry, marks, f"`{split.column}`" if is_text else f"`{split.column}[{number}]`", tidy)
        for number, entry in enumerate(marked_context(split.context, sample.get(STRIPPED)))
    ]
    context, pieces = stripped_context(marked, text=is_text)
    if pieces and not (context.strip() if isinstance(context, str) else context):
        raise ValueError(f"`{split.column}` is marked as a whole, which leaves nothing for the decision to answer")
    result = {**with_context(sample, context), STRIPPED: pieces}
    if pieces and not allow_quotes:
        decisions = [sample[name] for name in _DECISION_COLUMNS if sample.get(name) is not None] or [split.decision]
        quote = find_quote([text for piece in pieces for text in piece_texts(piece)], decisions, quote_words)
        if quote:
            raise QuotedInstructionError(
                f"the decision quotes what was stripped, {quote!r}: leave the sample out, or allow quotes"
            )
    return result


def restore_instructions(sample: dict[str, Any]) -> dict[str, Any]:
    """Gives back the exact sample from before stripping, without the column `stripped`.

    Args:
        sample: A row; one without `stripped` comes back as it is.

    Raises:
        ValueError: The row is no sample, or its `stripped` does not fit it.
    """
    split = split_sample(sample)
    full = [entry.message for entry in marked_context(split.context, sample.get(STRIPPED))]
    context = full[0]["content"] if isinstance(split.context, str) else full
    return {name: value for name, value in with_context(sample, context).items() if name != STRIPPED}


def _mark(entry: MarkedMessage, marks: Marks, place: str, tidy: bool) -> MarkedMessage:
    """Adds what the marks cover to what is stripped already."""
    message = entry.message
    if entry.whole or marks.cover(message, place):
        return MarkedMessage(message, whole=True)
    stretches: list[tuple[int, int, int]] = []
    for part, text, known in entry.texts():
        where = place if part == -1 else f"{place}, part {part}"
        found = merged([*known, *marks.stretches(text, where)])
        stretches += [(part, *stretch) for stretch in (_tidied(text, found) if tidy else found)]
    result = MarkedMessage(message, stretches=tuple(stretches))
    if stretches and "role" in message and _is_empty(result.visible):
        return MarkedMessage(message, whole=True)
    return result


def _is_empty(message: dict[str, Any]) -> bool:
    """Whether a message has nothing to say: no text, and nothing that is meant without one."""
    content = message["content"]
    texts = message_texts(message)
    only_text = isinstance(content, str) or len(texts) == len(content)
    return only_text and not any(text.strip() for _, text in texts) and not any(map(message.get, _OTHER_MATTER))


def _tidied(text: str, stretches: list[Stretch]) -> list[Stretch]:
    """Stretches with one of the two runs of white space around each; the same again gives no more."""
    while True:
        wider = merged([_widened(text, *stretch) for stretch in stretches], touching=True)
        if wider == stretches:
            return wider
        stretches = wider


def _widened(text: str, start: int, end: int) -> Stretch:
    first, last = len(text[:start].rstrip()), len(text) - len(text[end:].lstrip())
    if first == 0 or last == len(text):
        return first, last
    before, after = text[first:start], text[end:last]
    keep_after = (after.count("\n"), len(after)) > (before.count("\n"), len(before))
    return (first, end) if keep_after else (start, last)
