# SPDX-License-Identifier: Apache-2.0
"""Whether a decision quotes a text: so many words in a row in common.

Words are runs of letters, their marks and digits, whatever their case or width; everything else separates them. In
scripts that write no spaces each character is a word.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["find_quote"]

# All of a text of three words in common is a quote, all of one of two is chance.
_SHORTEST_TEXT_WORDS = 3

_TAG = re.compile(r"</?[^\W\d][\w.:-]*(?:\s[^<>]*)?/?>")
# Thai, Lao, Myanmar, Khmer, kana and Han.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff])"
)


def find_quote(texts: Iterable[str], decisions: Any, num_words: int) -> str | None:
    """Looks for words in a row of a text in a decision.

    Args:
        texts: What must not be quoted.
        decisions: Text, or whatever holds texts: messages, lists of them. Roles are not looked at.
        num_words: How many words in a row are a quote; all words of a shorter text are one if it has at least three.

    Returns:
        The first quote, in words; None where there is none.
    """
    said = [_words(text) for text in _strings(decisions)]
    runs: dict[int, set[tuple[str, ...]]] = {}
    for text in texts:
        # Without tags, which are no words of what they mark; and with them, since not all that looks like one is one.
        for words in (_words(_TAG.sub(" ", text)), _words(text)):
            length = min(num_words, max(len(words), _SHORTEST_TEXT_WORDS))
            if length not in runs:
                runs[length] = {run for spoken in said for run in _runs(spoken, length)}
            quote = next((run for run in _runs(words, length) if run in runs[length]), None)
            if quote:
                return " ".join(quote)
    return None


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[first : first + length]) for first in range(len(words) - length + 1))


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text)
    return _UNSPACED.sub(r" \1 ", text).split()


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, whatever holds them; roles are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name != "role":
                yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
