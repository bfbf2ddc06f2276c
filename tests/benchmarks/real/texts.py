# SPDX-License-Identifier: Apache-2.0
"""Real text in three parts that have no document and no person in common, and stretches of it of a wanted length."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tests.benchmarks.real.fetch import CONVERSATIONS, DOCUMENTS

Part = Literal["train", "dev", "held-out"]
PARTS: tuple[Part, ...] = get_args(Part)
# Percent of sources that belong to a part, or to one before it.
BOUNDS = {"train": 55, "dev": 70, "held-out": 100}


@dataclass(frozen=True)
class Source:
    """A document or a conversation.

    Attributes:
        paragraphs: In their order; of a conversation what was said, where `{0}` and `{1}` stand for the speakers.
        num_people: Who speak.
    """

    paragraphs: tuple[str, ...]
    num_people: int = 0


@dataclass
class Texts:
    """All sources, by part, documents and conversations apart."""

    documents: dict[Part, list[Source]] = field(default_factory=lambda: {part: [] for part in PARTS})
    conversations: dict[Part, list[Source]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def draw(
        self, part: Part, num_tokens: int, count: Callable[[str], int], names: Sequence[str], choice: random.Random
    ) -> list[str]:
        """Paragraphs that follow one another, of one source unless it ends before the length is reached.

        Args:
            part: Which sources.
            num_tokens: Reached, if at all, with the last paragraph; what is beyond it is cut off at a word.
            count: Tells a text's tokens.
            names: What speakers are called, two at least.
            choice: Decides.
        """
        kind = choice.choice([self.documents, self.conversations])[part]
        taken: list[str] = []
        missing = num_tokens
        while missing > 0:
            source = choice.choice(kind)
            called = choice.sample(list(names), source.num_people)
            start = choice.randrange(max(1, len(source.paragraphs) // 2))
            for paragraph in source.paragraphs[start:]:
                text = _named(paragraph, called)
                length = count(text)
                if length > missing:
                    words = text.split(" ")
                    text = " ".join(words[: max(1, len(words) * missing // length)])
                taken.append(text)
                missing -= length
                if missing <= 0:
                    break
        return taken


def read_texts(folder: Path) -> Texts:
    """Reads the two files that `fetch` writes.

    A conversation whose people belong to different parts belongs to none and is left out.

    Raises:
        ValueError: A part has no document or no conversation.
        FileNotFoundError: A file is missing.
    """
    texts = Texts()
    for row in _rows(folder / DOCUMENTS):
        texts.documents[part_of(row["source"])].append(Source(tuple(row["paragraphs"])))
    for row in _rows(folder / CONVERSATIONS):
        (part, *others) = {part_of(person) for person in row["people"]}
        lines = tuple(f"{{{speaker}}}: {text}" for speaker, text in row["lines"] if text)
        if not others and len(row["people"]) == 2 and len(lines) > 1:
            texts.conversations[part].append(Source(lines, 2))
    for kind in ("documents", "conversations"):
        empty = [part for part, found in getattr(texts, kind).items() if not found]
        if empty:
            raise ValueError(f"{folder}: no {kind} for {', '.join(empty)}; more sources are needed, found too few")
    return texts


def part_of(source: str) -> Part:
    """The part that a document or a person belongs to, by the digest of its name."""
    place = int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % 100
    return next(part for part in PARTS if place < BOUNDS[part])


def _named(paragraph: str, names: Sequence[str]) -> str:
    """The speaker's name put in; braces of the text itself stay."""
    for index, name in enumerate(names):
        if paragraph.startswith(mark := f"{{{index}}}: "):
            return f"{name}: {paragraph[len(mark) :]}"
    return paragraph


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
