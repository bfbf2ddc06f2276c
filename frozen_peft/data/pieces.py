# SPDX-License-Identifier: Apache-2.0
"""What was stripped, kept in a row's column `stripped` as pieces, and put back where it stood.

A piece is a whole message or a stretch of one's text. Its place is that in the context *with* the instructions, so
pieces in order say it all: walk through the context, and wherever one is due, it comes next. All pieces have the same
keys of the same types, which `datasets` needs:

| key | of a whole message | of a stretch |
| --- | --- | --- |
| `index` | its number in the context | the number of the message it stands in; -1 in a text prompt |
| `part` | -1 | the number of the part where the message's content is parts, else -1 |
| `start` | -1 | its first character's number in the text |
| `text` | empty | the text |
| `message` | the message as JSON | empty |
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from frozen_peft.data.conversation import Context, Message, message_texts
from frozen_peft.data.marks import Stretch, text_between
from frozen_peft.data.row_checks import require_kind

__all__ = [
    "STRIPPED",
    "MarkedMessage",
    "Piece",
    "marked_context",
    "piece_texts",
    "stripped_context",
    "with_text",
]

# The column that holds the pieces.
STRIPPED = "stripped"

Piece = dict[str, Any]

_TYPES = {"index": int, "part": int, "start": int, "text": str, "message": str}


@dataclass(frozen=True)
class MarkedMessage:
    """A message with its instructions, and what of it is (to be) stripped.

    Attributes:
        message: The message in full. A text prompt is a message of `content` alone.
        whole: All of it is stripped.
        stretches: `(part, start, end)` of what is stripped of its texts, in order and without overlap.
    """

    message: Message
    whole: bool = False
    stretches: tuple[tuple[int, int, int], ...] = ()

    def texts(self) -> Iterator[tuple[int, str, list[Stretch]]]:
        """The number of each of its texts, as `message_texts` has it, the text, and what is stripped of it."""
        for part, text in message_texts(self.message):
            yield part, text, [(start, end) for number, start, end in self.stretches if number == part]

    @property
    def visible(self) -> Message:
        """The message without its stripped stretches; the same object where there are none."""
        message = self.message
        for part, text, stretches in self.texts():
            if stretches:
                message = with_text(message, part, "".join(text_between(text, stretches)))
        return message


def marked_context(context: Context, stripped: Sequence[Piece] | None) -> list[MarkedMessage]:
    """Puts the pieces back into a context and says where they stand in it.

    Args:
        context: Messages or text, without the pieces.
        stripped: The row's column of that name; None and empty mean that nothing was stripped.

    Raises:
        ValueError: The pieces are malformed, or do not fit the context.
    """
    pieces = _checked(stripped)
    own: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        own[piece["index"]].append(piece)
    if isinstance(context, str):
        marked = [_with_stretches({"content": context}, own[-1])]
    else:
        marked = []
        rest = deque(context)
        for index in range(len(context) + sum(bool(piece["message"]) for piece in pieces)):
            if own[index] and own[index][0]["message"]:
                marked.append(MarkedMessage(json.loads(own[index][0]["message"]), whole=True))
            elif rest:
                marked.append(_with_stretches(rest.popleft(), own[index]))
    num_placed = sum(entry.whole + len(entry.stretches) for entry in marked)
    if num_placed != len(pieces):
        raise ValueError(
            f"{len(pieces) - num_placed} of {len(pieces)} pieces in `stripped` have no place in the context: it was "
            "changed after it was stripped; strip the changed original instead"
        )
    return marked


def stripped_context(marked: Sequence[MarkedMessage], *, text: bool) -> tuple[Context, list[Piece]]:
    """The reverse of `marked_context`: a context without its pieces, and the pieces.

    Args:
        marked: The context in full.
        text: It is a text prompt.

    Raises:
        ValueError: A message that is stripped holds what JSON cannot.
    """
    kept: list[Message] = []
    pieces: list[Piece] = []
    for index, entry in enumerate(marked):
        if entry.whole:
            pieces.append(_piece(index, message=_as_json(entry.message)))
            continue
        texts = dict(message_texts(entry.message))
        for part, start, end in entry.stretches:
            pieces.append(_piece(-1 if text else index, part, start, texts[part][start:end]))
        kept.append(entry.visible)
    return (kept[0]["content"] if text else kept), pieces


def piece_texts(piece: Piece) -> list[str]:
    """What a piece says: its text, or the texts of its message."""
    if piece["message"]:
        return [text for _, text in message_texts(json.loads(piece["message"]))]
    return [piece["text"]]


def _piece(index: int, part: int = -1, start: int = -1, text: str = "", message: str = "") -> Piece:
    return {"index": index, "part": part, "start": start, "text": text, "message": message}


def _as_json(message: Message) -> str:
    try:
        text = json.dumps(message, ensure_ascii=False)
        exact = json.loads(text) == message
    except TypeError:
        exact = False
    if not exact:
        raise ValueError(f"a message to strip holds what JSON cannot, so it could not be put back: {message!r}")
    return text


def with_text(message: Message, part: int, text: str) -> Message:
    """A copy of a message with another text as its content, or as that part of it."""
    if part == -1:
        return {**message, "content": text}
    parts = list(message["content"])
    parts[part] = {**parts[part], "text": text}
    return {**message, "content": parts}


def _with_stretches(message: Message, pieces: Sequence[Piece]) -> MarkedMessage:
    """Puts stretches back into a message's texts."""
    stretches = []
    for part, text in message_texts(message):
        full, used = "", 0
        for piece in (piece for piece in pieces if piece["part"] == part):
            upto = used + piece["start"] - len(full)
            if not used <= upto <= len(text):
                break  # it has no place, which `marked_context` reports
            full += text[used:upto] + piece["text"]
            used = upto
            stretches.append((part, piece["start"], len(full)))
        if used or full:
            message = with_text(message, part, full + text[used:])
    return MarkedMessage(message, stretches=tuple(stretches))


def _checked(stripped: Any) -> list[Piece]:
    """The pieces, each of which has the keys and types of one."""
    if stripped is None:
        return []
    require_kind(stripped, STRIPPED, "a list")
    for number, piece in enumerate(stripped):
        if not isinstance(piece, dict) or {key: type(value) for key, value in piece.items()} != _TYPES:
            raise ValueError(f"`stripped[{number}]` is not a piece that `strip` wrote: {piece!r}")
        try:
            is_message = isinstance(json.loads(piece["message"] or "{}"), dict)
        except json.JSONDecodeError:
            is_message = False
        if not is_message:
            raise ValueError(f"`stripped[{number}]`: `message` is not a message in JSON: {piece['message']!r}")
    return stripped
