# SPDX-License-Identifier: Apache-2.0
"""Other wordings of whole sentences and messages."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from frozen_peft.data.marks import Stretch, text_between
from frozen_peft.data.rows import Row, read_rows

__all__ = ["Paraphrases", "read_paraphrases"]

# Sentences end with one of these and white space, or with one of the second whatever follows.
_ENDS = ".!?…:;"
_WIDE_ENDS = "。！？"
# What may stand between the end of a sentence and the white space, and before the first word of a line.
_CLOSING = "\"'”’»)]*_"
_BULLETS = " \t-*•>#"


@dataclass(frozen=True)
class Paraphrases:
    """Texts with alternatives that say the same.

    Attributes:
        alternatives: A sentence, several in a row, or a whole message, and what may stand in its place.

    Raises:
        ValueError: There are none, or one is empty.
    """

    alternatives: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        if not self.alternatives:
            raise ValueError("no paraphrases")
        for text, alternatives in self.alternatives.items():
            if not text or text != text.strip():
                raise ValueError(f"a text to paraphrase is empty or has white space around it: {text!r}")
            if not alternatives or any(not other.strip() for other in alternatives):
                raise ValueError(f"the alternatives to {text!r} are none, or one of them is empty")

    def reword(self, text: str, fixed: Sequence[Stretch], wording: Callable[[str], str]) -> tuple[str, list[Stretch]]:
        """Puts other wordings into a text.

        Args:
            text: What is reworded where one of the texts is whole sentences of it, or all of it.
            fixed: Stretches, in order, that are not part of the sentences and stay as they are.
            wording: Says what to put in the place of one of the texts.

        Returns:
            The reworded text, and where the fixed stretches are in it.
        """
        # Sentences are read as they are without the fixed stretches; none that reaches across one is reworded.
        segments = text_between(text, fixed)
        visible = "".join(segments)
        result, first = "", 0
        moved: list[Stretch] = []
        for number, segment in enumerate(segments):
            if number:
                start, end = fixed[number - 1]
                moved.append((len(result), len(result) + end - start))
                result += text[start:end]
            result += self._reworded(visible, first, first + len(segment), wording)
            first += len(segment)
        return result, moved

    def _reworded(self, text: str, first: int, last: int, wording: Callable[[str], str]) -> str:
        """The part of a text from `first` to `last`, reworded."""
        result, place = "", first
        while (match := self._any_text.search(text, place)) and match.start() < last:
            if match.end() <= last and _starts_sentence(text, match.start()):
                result += text[place : match.start()] + wording(match.group())
                place = match.end()
            else:
                result += text[place : match.start() + 1]
                place = match.start() + 1
        return result + text[place:last]

    @cached_property
    def _any_text(self) -> re.Pattern[str]:
        """Any of the texts where a sentence ends with it, the longest first."""
        return re.compile(
            "|".join(
                re.escape(text) + _end_after(text)
                for text in sorted(self.alternatives, key=lambda text: (-len(text), text))
            )
        )


def read_paraphrases(path: Path) -> Paraphrases:
    """Reads rows `{"text": ..., "alternatives": [...]}`; rows of the same text add up.

    Raises:
        ValueError: A row is malformed, or there are none.
        FileNotFoundError: There is no such file.
    """
    alternatives: dict[str, list[str]] = {}
    for row in read_rows(path, _of_row, empty="the file has no paraphrases"):
        for text, others in row.alternatives.items():
            alternatives.setdefault(text, []).extend(others)
    return Paraphrases(alternatives)


def _of_row(row: Row) -> Paraphrases:
    text, alternatives = row.values.get("text"), row.values.get("alternatives")
    if not isinstance(text, str):
        raise ValueError("a paraphrase has a `text`")
    if not isinstance(alternatives, list) or not all(isinstance(other, str) for other in alternatives):
        raise ValueError("a paraphrase has `alternatives`, a list of texts")
    return Paraphrases({text: alternatives})


def _end_after(text: str) -> str:
    """What must follow for a text to be whole sentences: a pattern that takes nothing."""
    last = text.rstrip(_CLOSING)[-1:]
    if last and last in _WIDE_ENDS:
        return ""
    if last and last in _ENDS:
        return r"(?!\S)"
    # A line, or a message, that ends without a full stop.
    return r"(?=[^\S\n]*(?:\n|\Z))"


def _starts_sentence(text: str, place: int) -> bool:
    before = text[:place].rstrip(_BULLETS)
    if not before or before.endswith(("\n", *_WIDE_ENDS)):
        return True
    return len(before) < place and before.rstrip(_CLOSING).endswith(tuple(_ENDS))
