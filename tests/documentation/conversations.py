# SPDX-License-Identifier: Apache-2.0
"""Conversations about the standard library's documentation, and the split that keeps modules apart.

A context is a run of whole entries between 1k and 8k tokens long. A module that is too small is joined with the next
one of the same split; one that is too large gives several contexts. What is left over below the minimum is dropped.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tests.documentation.library import Entry, ModuleDocumentation

MIN_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS = 1024, 8192
MAX_TEST_MODULE_SIZE = 3
INSTRUCTION = "Answer from this documentation."

CountTokens = Callable[[str], int]


class Message(TypedDict):
    """One message of a conversation, as chat templates read it."""

    role: str
    content: str


class Conversation(TypedDict):
    """One sample in TRL's conversational prompt-completion format.

    `name` and `modules` are for the reader of the file and for shuffling contexts; TRL ignores them.
    """

    prompt: list[Message]
    completion: list[Message]
    name: str
    modules: list[str]


@dataclass(frozen=True)
class Context:
    """A run of entries that is shown to the model as one message."""

    modules: tuple[str, ...]
    entries: tuple[Entry, ...]
    brief: bool = False

    def render(self) -> str:
        """Returns the text of the context message."""
        return "\n".join([INSTRUCTION, "", *(entry.render(brief=self.brief) for entry in self.entries)])


def split_modules(
    modules: Sequence[ModuleDocumentation], *, test_fraction: float = 0.15, seed: int = 0
) -> tuple[list[ModuleDocumentation], list[ModuleDocumentation]]:
    """Splits whole modules into train and test, so that nothing said about a test module is ever trained on.

    A module of more than `MAX_TEST_MODULE_SIZE` times the mean size stays in train, so that what is held out is many
    modules and not one.

    Args:
        modules: At least two modules.
        test_fraction: Share of all entries, between 0 and 1, that the test modules hold at least.
        seed: Decides which modules are held out, and the order of both lists.

    Returns:
        Train modules and test modules, both in shuffled order.

    Raises:
        ValueError: One of the two splits would be empty.
    """
    shuffled = random.Random(seed).sample(list(modules), len(modules))
    num_entries = sum(len(module.entries) for module in modules)
    held_out = 0
    train, test = [], []
    for module in shuffled:
        small = len(module.entries) * len(modules) <= MAX_TEST_MODULE_SIZE * num_entries
        if small and held_out < test_fraction * num_entries:
            test.append(module)
            held_out += len(module.entries)
        else:
            train.append(module)
    if not train or not test:
        raise ValueError(
            f"`test_fraction` must leave modules in both splits, got {test_fraction} for {len(modules)} modules. "
            "Choose it between 0 and 1, and give more modules."
        )
    return train, test


def cut_contexts(
    modules: Sequence[ModuleDocumentation],
    count_tokens: CountTokens,
    *,
    min_tokens: int,
    max_tokens: int,
    brief: bool = False,
    seed: int = 0,
) -> Iterator[Context]:
    """Cuts modules into contexts of whole entries, with lengths spread evenly on a logarithmic scale.

    Args:
        modules: Read in order; a context may span several.
        count_tokens: Length of a text in tokens.
        min_tokens: No context is shorter; a remainder that would be is dropped.
        max_tokens: No context is longer.
        brief: Whether entries are names and summaries only.
        seed: Decides the lengths.

    Yields:
        Contexts in the order of the modules.
    """
    lengths = random.Random(seed)
    frame_tokens = count_tokens(INSTRUCTION + "\n\n")
    target, length = _draw_length(lengths, min_tokens, max_tokens), frame_tokens
    entries: list[Entry] = []
    names: list[str] = []
    for module in modules:
        for entry in module.entries:
            # One more for the newline that joins entries: pretokenization keeps everything else apart.
            entry_tokens = count_tokens(entry.render(brief=brief)) + 1
            if entries and length + entry_tokens > target:
                if length >= min_tokens:
                    yield Context(tuple(names), tuple(entries), brief)
                    entries, names, length = [], [], frame_tokens
                    target = _draw_length(lengths, min_tokens, max_tokens)
                elif length + entry_tokens > max_tokens:
                    continue
            entries.append(entry)
            length += entry_tokens
            if module.name not in names:
                names.append(module.name)
    if length >= min_tokens:
        yield Context(tuple(names), tuple(entries), brief)


def build_conversations(
    modules: Sequence[ModuleDocumentation],
    count_tokens: CountTokens,
    *,
    questions_per_context: int = 4,
    min_tokens: int = MIN_CONTEXT_TOKENS,
    max_tokens: int = MAX_CONTEXT_TOKENS,
    seed: int = 0,
) -> list[Conversation]:
    """Asks several questions about every context: what does NAME do? The answer is the entry's summary line.

    Args:
        modules: The modules of one split.
        count_tokens: Length of a text in tokens.
        questions_per_context: Samples per context; fewer where the context has fewer entries.
        min_tokens: Shortest context.
        max_tokens: Longest context.
        seed: Decides the contexts' lengths and which entries are asked about.

    Returns:
        Samples in random order; the same arguments give the same samples.
    """
    choice = random.Random(seed)
    conversations = []
    for context in cut_contexts(modules, count_tokens, min_tokens=min_tokens, max_tokens=max_tokens, seed=seed):
        for entry in choice.sample(context.entries, min(questions_per_context, len(context.entries))):
            conversations.append(
                Conversation(
                    prompt=[Message(role="system", content=context.render()), ask(entry)],
                    completion=[answer(entry)],
                    name=entry.name,
                    modules=list(context.modules),
                )
            )
    choice.shuffle(conversations)
    return conversations


def shuffle_contexts(conversations: Sequence[Conversation], *, seed: int = 0) -> list[Conversation]:
    """Gives every question the context of another sample, one that documents none of the same modules.

    Args:
        conversations: Samples of at least two contexts without a module in common.
        seed: Decides who gets which.

    Returns:
        The same questions and answers in the same order; the right answer is no longer in the context.

    Raises:
        ValueError: Some sample has no other context to take.
    """
    choice = random.Random(seed)
    shuffled = []
    for conversation in conversations:
        others = [other for other in conversations if not set(other["modules"]) & set(conversation["modules"])]
        if not others:
            raise ValueError(
                f"Every context documents one of {', '.join(conversation['modules'])}, so the question about "
                f"`{conversation['name']}` can be given no other context. Use more modules."
            )
        other = choice.choice(others)
        prompt = [other["prompt"][0], *conversation["prompt"][1:]]
        shuffled.append(Conversation(**{**conversation, "prompt": prompt, "modules": other["modules"]}))
    return shuffled


def write_jsonl(path: Path, conversations: Sequence[Conversation]) -> None:
    """Writes one JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations)


def read_jsonl(path: Path) -> list[Conversation]:
    """Reads what :func:`write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ask(entry: Entry) -> Message:
    """Returns the user's question about an entry."""
    return Message(role="user", content=f"What does {entry.name} do?")


def answer(entry: Entry) -> Message:
    """Returns the assistant's answer: the entry's summary line."""
    return Message(role="assistant", content=entry.summary)


def _draw_length(lengths: random.Random, min_tokens: int, max_tokens: int) -> float:
    return float(min_tokens * (max_tokens / min_tokens) ** lengths.random())
