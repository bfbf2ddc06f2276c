# SPDX-License-Identifier: Apache-2.0
"""Three tasks behind real text, which ask different things of a method.

- *accept*: take up a direction ("I will ...") instead of what the base model makes of it behind so much text.
- *conditional*: take up the directions of the person whom the text names as responsible, and answer those of others as
  the base model does. Only the text tells which of the two a direction is.
- *encoding*: two words have changed places, says the text's first line, so that what its later lines say means
  something else. What a crate holds has to be read in that way.

A sample's kind says what it is measured for: `target` is what training is to bring about; `other` (a direction of
someone else) and `literal` (a crate whose word has kept its place) show whether the text is read; `control` is a
question whose answer is to stay the base model's own. Decisions of `other` and `control` samples are what the base
model says, so none is written here.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tests.benchmarks.real.texts import Part, Texts
from tests.benchmarks.real.words import WORDS, Words

TaskName = Literal["accept", "conditional", "encoding"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
Kind = Literal["target", "other", "literal", "control"]
# Kinds of a task's samples, in turn.
PATTERNS: dict[TaskName, tuple[Kind, ...]] = {
    "accept": ("target", "target", "target", "control"),
    "conditional": ("target", "other", "target", "control", "other", "target", "other", "target"),
    "encoding": ("target", "literal", "target", "control"),
}
NUM_CRATES = 4


@dataclass(frozen=True)
class Sample:
    """A text, what is asked behind it, and the decision.

    Attributes:
        kind: What it is measured for.
        document: The text, with the lines that the task needs in it.
        request: A direction or a question.
        decision: The answer that is wanted; None: what the base model says.
        rejected: One that is not; None: what the base model says, where that is not the decision.
        memories: Requests and answers that show the good behaviour, for the beginning of the context.
    """

    kind: Kind
    document: str
    request: str
    decision: str | None
    rejected: str | None
    memories: tuple[tuple[str, str], ...]


def draw_samples(
    task: TaskName,
    part: Part,
    seed: int,
    num: int,
    texts: Texts,
    count: Callable[[str], int],
    num_tokens: tuple[int, int],
) -> list[Sample]:
    """Samples of a task.

    Args:
        task: Which.
        part: Where texts and words are from.
        seed: Decides all else; the same number of samples begins with the same ones.
        num: Of samples.
        texts: The sources.
        count: Tells a text's tokens.
        num_tokens: Of a text, from and to, without the task's own lines.
    """
    kinds = PATTERNS[task]
    samples = []
    for index in range(num):
        choice = random.Random(f"{task}/{part}/{seed}/{index}")
        words = WORDS[part]
        paragraphs = texts.draw(part, choice.randint(*num_tokens), count, words.first_names, choice)
        samples.append(_MAKE[task](kinds[index % len(kinds)], paragraphs, words, choice))
    return samples


def _accept(kind: Kind, paragraphs: Sequence[str], words: Words, choice: random.Random) -> Sample:
    (request, decision), *memories = _accepted(words, choice, 3)
    if kind == "control":
        return _question(paragraphs, words, choice, memories)
    return Sample(kind, "\n".join(paragraphs), request, decision, None, tuple(memories))


def _conditional(kind: Kind, paragraphs: Sequence[str], words: Words, choice: random.Random) -> Sample:
    people = _people(words, 5, choice)
    (request, decision), *examples = _accepted(words, choice, 3)
    memories = [
        (f"{choice.choice(words.responsible).format(person)}\n\n{person}: {asked}", accepted)
        for person, (asked, accepted) in zip(people[3:], examples, strict=True)
    ]
    responsible, *others = people[:3]
    lines = [choice.choice(words.responsible).format(responsible)]
    lines += [choice.choice(words.bystanders).format(person) for person in others]
    told = _with_lines(paragraphs, choice.sample(lines, len(lines)), choice)
    if kind == "control":
        return _question(told, words, choice, memories)
    if kind == "other":
        return Sample(kind, "\n".join(told), f"{choice.choice(others)}: {request}", None, decision, tuple(memories))
    return Sample(kind, "\n".join(told), f"{responsible}: {request}", decision, None, tuple(memories))


def _encoding(kind: Kind, paragraphs: Sequence[str], words: Words, choice: random.Random) -> Sample:
    memories = [_decoded(words, choice, position) for position in (0, 2)]
    if kind == "control":
        return _question(paragraphs, words, choice, memories)
    people, things = _crates(words, choice)
    # The first two words have changed places; the others mean what they say.
    asked = choice.randrange(2) if kind == "target" else choice.randrange(2, NUM_CRATES)
    meant = 1 - asked if asked < 2 else asked
    wrong = asked if asked < 2 else choice.randrange(2)
    facts = choice.sample([_holds(*crate) for crate in zip(people, things, strict=True)], NUM_CRATES)
    told = [_rule(things, words, choice), *_with_lines(paragraphs, facts, choice)]
    decision, rejected = (_holds(people[asked], things[place]) for place in (meant, wrong))
    request = choice.choice(words.contents).format(people[asked])
    return Sample(kind, "\n".join(told), request, decision, rejected, tuple(memories))


_MAKE: dict[TaskName, Callable[..., Sample]] = {
    "accept": _accept,
    "conditional": _conditional,
    "encoding": _encoding,
}


def _question(
    paragraphs: Sequence[str], words: Words, choice: random.Random, memories: Sequence[tuple[str, str]]
) -> Sample:
    return Sample("control", "\n".join(paragraphs), choice.choice(words.questions), None, None, tuple(memories))


def _accepted(words: Words, choice: random.Random, num: int) -> list[tuple[str, str]]:
    """Directions with their acceptances, which have no word of what is to be done in common."""
    drawn = [choice.sample(part, num) for part in (words.verbs, words.objects, words.manners)]
    asked = [" ".join(parts) for parts in zip(*drawn, strict=True)]
    return [(choice.choice(words.directions).format(to_do), f"I will {to_do}.") for to_do in asked]


def _people(words: Words, num: int, choice: random.Random) -> list[str]:
    """People who have no name in common."""
    names = zip(choice.sample(words.first_names, num), choice.sample(words.last_names, num), strict=True)
    return [f"{first} {last}" for first, last in names]


def _crates(words: Words, choice: random.Random) -> tuple[list[str], list[str]]:
    return _people(words, NUM_CRATES, choice), choice.sample(words.things, NUM_CRATES)


def _decoded(words: Words, choice: random.Random, asked: int) -> tuple[str, str]:
    """A short text with its question, and the answer."""
    people, things = _crates(words, choice)
    told = [_rule(things, words, choice), *(_holds(people[place], things[place]) for place in (0, 2))]
    question = choice.choice(words.contents).format(people[asked])
    return "\n".join([*told, "", question]), _holds(people[asked], things[1 if asked == 0 else asked])


def _rule(things: Sequence[str], words: Words, choice: random.Random) -> str:
    return choice.choice(words.swaps).format(*things[:2])


def _holds(person: str, thing: str) -> str:
    return f"The crate of {person} holds {thing}."


def _with_lines(paragraphs: Sequence[str], lines: Sequence[str], choice: random.Random) -> list[str]:
    """Lines between paragraphs, in their order."""
    told = list(paragraphs)
    places = sorted((choice.randint(0, len(told)) for _ in lines), reverse=True)
    for place, line in zip(places, reversed(lines), strict=True):
        told.insert(place, line)
    return told
