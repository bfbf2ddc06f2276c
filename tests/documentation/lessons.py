# SPDX-License-Identifier: Apache-2.0
"""What the tiny model learns from scratch: short conversations, first over summaries alone, then over whole entries.

Contexts of a few hundred tokens and many questions about each give far more lookups per second than the long contexts
that the model is used with later.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tests.documentation.conversations import CountTokens, Message, answer, ask, cut_contexts
from tests.documentation.library import ModuleDocumentation

IGNORED_LABEL = -100
# Share of the tokens outside answers that are supervised. Looking up answers is what is wanted, and reading the rest
# teaches the words: this weighs the one against the other, evenly over every batch.
READING_SHARE = 0.25
# Conversations within a block are sorted by length, so that a batch has little padding and yet the order is random.
BATCHES_PER_BLOCK = 32


class Lesson(TypedDict):
    """One pre-tokenized sample."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Stage:
    """A stage of conversations.

    Attributes:
        batches: Optimizer steps.
        min_tokens: Shortest context.
        max_tokens: Longest context.
        turns: Most questions about one context.
        brief: Whether entries are names and summaries only.
    """

    batches: int
    min_tokens: int
    max_tokens: int
    turns: int
    brief: bool


@dataclass(frozen=True)
class Curriculum:
    """What is learned, in this order.

    Attributes:
        batch_size: Conversations per optimizer step.
        stages: Of conversations.
    """

    batch_size: int = 3
    stages: tuple[Stage, ...] = (
        Stage(batches=850, min_tokens=64, max_tokens=256, turns=8, brief=True),
        Stage(batches=60, min_tokens=128, max_tokens=640, turns=12, brief=False),
    )

    @property
    def steps(self) -> int:
        """Optimizer steps altogether."""
        return sum(stage.batches for stage in self.stages)


def build_lessons(
    modules: Sequence[ModuleDocumentation],
    tokenizer: PreTrainedTokenizerFast,
    count_tokens: CountTokens,
    curriculum: Curriculum,
    *,
    seed: int = 0,
) -> Dataset:
    """Builds the pretraining samples in the order in which they are to be read.

    Args:
        modules: The modules of the train split.
        tokenizer: Renders conversations with its chat template.
        count_tokens: Length of a text in tokens.
        curriculum: The stages.
        seed: Decides cuts, questions and order.

    Returns:
        `steps * batch_size` rows of `input_ids` and `labels`. Answers are supervised, and of
        documentation and questions a random `READING_SHARE` of the tokens.

    Raises:
        ValueError: The modules hold less documentation than one context of some stage.
    """
    choice = random.Random(seed)
    lessons: list[Lesson] = []
    for stage in curriculum.stages:
        conversations: list[Lesson] = []
        while len(conversations) < stage.batches * curriculum.batch_size:
            one_pass = list(_conversations(modules, tokenizer, count_tokens, stage, choice))
            if not one_pass:
                raise ValueError(
                    f"The modules give no context of {stage.min_tokens} tokens or more. Use more modules, or a "
                    "smaller `min_tokens`."
                )
            conversations += one_pass
        conversations = conversations[: stage.batches * curriculum.batch_size]
        lessons += _batched_by_length(conversations, curriculum.batch_size, choice)
    return Dataset.from_list(lessons)


def _conversations(
    modules: Sequence[ModuleDocumentation],
    tokenizer: PreTrainedTokenizerFast,
    count_tokens: CountTokens,
    stage: Stage,
    choice: random.Random,
) -> Iterator[Lesson]:
    """Cuts the documentation once, at places that no other pass cuts at, and asks about every piece."""
    order = choice.sample(modules, len(modules))
    cuts = choice.randrange(2**32)
    contexts = list(
        cut_contexts(
            order,
            count_tokens,
            min_tokens=stage.min_tokens,
            max_tokens=stage.max_tokens,
            brief=stage.brief,
            seed=cuts,
        )
    )
    choice.shuffle(contexts)
    for context in contexts:
        messages = [Message(role="system", content=context.render())]
        for entry in choice.sample(context.entries, min(stage.turns, len(context.entries))):
            messages += [ask(entry), answer(entry)]
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        tokens = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [
            token if in_answer or choice.random() < READING_SHARE else IGNORED_LABEL for token, in_answer in tokens
        ]
        yield Lesson(input_ids=encoded["input_ids"], labels=labels)


def _batched_by_length(lessons: list[Lesson], batch_size: int, choice: random.Random) -> list[Lesson]:
    batches = []
    for start in range(0, len(lessons), batch_size * BATCHES_PER_BLOCK):
        block = sorted(
            lessons[start : start + batch_size * BATCHES_PER_BLOCK], key=lambda lesson: len(lesson["input_ids"])
        )
        in_block = [block[first : first + batch_size] for first in range(0, len(block), batch_size)]
        choice.shuffle(in_block)
        batches += in_block
    return [lesson for batch in batches for lesson in batch]
