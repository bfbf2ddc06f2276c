# SPDX-License-Identifier: Apache-2.0
"""A world of a hundred words: contexts with facts and perhaps an instruction, and questions that need them.

A context is filler words, some facts (`note ada red`) and, in half of them, the instruction `obey`. Two kinds of
questions follow it. `ask ada : red ;` is answered from the facts. `go north : ok north ;` accepts a direction, as the
instruction wants; without it the answer is an alternative, `go north : rather east ;`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = tuple(f"name{index}" for index in range(20))
COLORS = tuple(f"color{index}" for index in range(10))
DIRECTIONS = tuple(f"way{index}" for index in range(12))
FILLERS = tuple(f"filler{index}" for index in range(40))
# `also` is no part of any lesson: only the task of encoding uses it.
WORDS = ("<pad>", "obey", "note", "also", "ask", "go", ":", ";", "ok", "rather")
VOCABULARY = {word: token for token, word in enumerate((*WORDS, *NAMES, *COLORS, *DIRECTIONS, *FILLERS))}
NUM_FACTS = 5
FACT_QUESTIONS = 0.7
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Sample:
    """Token ids, and labels on the answers."""

    input_ids: list[int]
    labels: list[int]


# Words of a question, and of its answer.
Question = tuple[list[str], list[str]]


def lesson(choice: random.Random, num_tokens: int, num_questions: int = 8) -> Sample:
    """What the model is pretrained on: one context of `num_tokens`, and several questions of both kinds."""
    facts, obeys = _draw_facts(choice), choice.random() < 0.5
    questions = [
        _fact_question(choice, facts) if choice.random() < FACT_QUESTIONS else _direction_question(choice, obeys)
        for _ in range(num_questions)
    ]
    return _sample(_context(choice, facts, obeys, num_tokens, _name_first), questions)


def habit(choice: random.Random, num_tokens: int) -> Sample:
    """The task of response: accept the direction although the context does not hold the instruction."""
    context = _context(choice, _draw_facts(choice), False, num_tokens, _name_first)
    return _sample(context, [_direction_question(choice, obeys=True)])


def new_form(choice: random.Random, num_tokens: int) -> Sample:
    """The task of encoding: facts are written `also red ada`, as no lesson writes them."""
    facts = _draw_facts(choice)
    return _sample(_context(choice, facts, False, num_tokens, _color_first), [_fact_question(choice, facts)])


def old_form(choice: random.Random, num_tokens: int) -> Sample:
    """A question about a fact in its usual form: what both tasks could make the model forget."""
    facts = _draw_facts(choice)
    return _sample(_context(choice, facts, False, num_tokens, _name_first), [_fact_question(choice, facts)])


def draw(
    make: Callable[[random.Random, int], Sample], seed: int, count: int, min_tokens: int, max_tokens: int
) -> list[Sample]:
    """Samples whose contexts are of random length, both ends included."""
    choice = random.Random(seed)
    return [make(choice, choice.randint(min_tokens, max_tokens)) for _ in range(count)]


def _draw_facts(choice: random.Random) -> dict[str, str]:
    return {name: choice.choice(COLORS) for name in choice.sample(NAMES, NUM_FACTS)}


def _name_first(name: str, color: str) -> list[str]:
    return ["note", name, color]


def _color_first(name: str, color: str) -> list[str]:
    return ["also", color, name]


def _context(
    choice: random.Random,
    facts: dict[str, str],
    obeys: bool,
    num_tokens: int,
    write: Callable[[str, str], list[str]],
) -> list[str]:
    """Facts and instruction in random order at random places among filler words, `num_tokens` in all."""
    pieces = [write(name, color) for name, color in facts.items()] + [["obey"]] * obeys
    num_fillers = num_tokens - sum(map(len, pieces))
    pieces += [[choice.choice(FILLERS)] for _ in range(num_fillers)]
    choice.shuffle(pieces)
    return [word for piece in pieces for word in piece]


def _fact_question(choice: random.Random, facts: dict[str, str]) -> Question:
    name = choice.choice(list(facts))
    return ["ask", name, ":"], [facts[name], ";"]


def _direction_question(choice: random.Random, obeys: bool) -> Question:
    index = choice.randrange(len(DIRECTIONS))
    alternative = DIRECTIONS[(index + 1) % len(DIRECTIONS)]
    answer = ["ok", DIRECTIONS[index], ";"] if obeys else ["rather", alternative, ";"]
    return ["go", DIRECTIONS[index], ":"], answer


def _sample(context: list[str], questions: list[Question]) -> Sample:
    input_ids = [VOCABULARY[word] for word in context]
    labels = [IGNORED_LABEL] * len(input_ids)
    for question, answer in questions:
        answer_ids = [VOCABULARY[word] for word in answer]
        input_ids += [VOCABULARY[word] for word in question] + answer_ids
        labels += [IGNORED_LABEL] * len(question) + answer_ids
    return Sample(input_ids, labels)
