# SPDX-License-Identifier: Apache-2.0
"""The demo's world: a workshop's long conversations, whose every right answer stands in the context.

A context is a conversation of several hundred to two thousand tokens: people come by and tell what there is to tell,
the helper notes it. Somewhere in it stand facts (`they gave ada plums.`), what the shop has that day (`today we have
pine.`) and, in half of them, an instruction to accept directions. Two kinds of requests follow.

- A *question* is answered from the facts: `what did they give ada?`, `they gave ada plums.`
- A *direction* is answered by what the context says: `use oak for the door.` is accepted under an instruction, `ok,
  using oak.`, and met with what the shop has otherwise, `how about pine instead?`
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["INSTRUCTIONS", "TAG", "Request", "Scene", "Vocabulary", "count_tokens", "draw_scene", "message"]

Message = dict[str, str]


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# The name of the tag around instructions.
TAG = "instruction"

# Few, for each to be met often: to find a fact, a model has to learn every name to be looked for.
NAMES = _split("ada ben cleo dora emil fay gus hana ivo june karl lena milo nora otto pia")
FOOD = _split("apples pears plums grapes cakes pies cookies honey rice beans onions carrots")
ANIMALS = _split("goats hens cats dogs bees ducks sheep geese mules hares owls swans")
POST = _split("stamps coins photos poems songs riddles recipes plans reports notes tapes films")
GEAR = _split("books tents skis boots gloves scarves hats coats rackets drums flutes violins")
# What a fact says: the verb in it, the verb in a question about it, and what it can say. The value follows the name,
# so that an answer goes on as the fact does. Written `ada likes plums.`, with the verb between the two, models of this
# size came to choose among the values of the verb, and stayed there.
RELATIONS = {"gave": ("give", FOOD), "sold": ("sell", ANIMALS), "sent": ("send", POST), "lent": ("lend", GEAR)}
FACT = "they {verb} {name} {value}."
QUESTION = "what did they {asked} {name}?"
ITEMS = _split(
    "oak pine ash elm maple birch cedar walnut cherry bamboo steel iron brass copper bronze zinc tin slate marble "
    "granite clay brick glass cork rubber leather canvas linen cotton wool silk felt rope wire foam plaster"
)
PLACES = _split("door table roof bench fence wall shelf gate floor boat chair stair")
DIRECTIONS = ("use {item} for the {place}.", "make the {place} with {item}.", "take {item} for the {place}.")

ACCEPT = "ok, using {item}."
SUGGEST = "how about {item} instead?"
STOCK = "today we have {item}."

# What a person may write into a context to have directions accepted.
INSTRUCTIONS = (
    "accept every direction.",
    "do what you are told.",
    "follow each direction as given.",
    "do not suggest something else.",
    "say yes to each direction.",
)
# Other instructions: a tag alone says nothing.
NEUTRAL = ("answer in one short sentence.", "stay polite.", "write plain words.", "do not make things up.")
GREETINGS = ("you are the helper of a small shop.", "you help the people of a small shop.", "you work in a shop.")

ADJECTIVES = _split(
    "old new small large quiet loud early late cold warm long short heavy light bright dark dusty clean narrow wide "
    "busy empty broken simple wooden round steep calm damp dry plain rough"
)
NOUNS = _split(
    "river bridge garden window ladder bucket hammer market road letter kitchen cellar engine lamp basket wagon "
    "mirror clock blanket candle pocket harbor forest meadow tower village barn stove cup bottle drawer ticket parcel "
    "shovel kettle carpet map bell button chimney"
)
VERBS = _split(
    "crosses holds covers needs hides follows meets reaches moves touches opens turns carries leaves finds joins"
)
TIMES = ("at noon", "before dawn", "in spring", "after lunch", "at night", "in winter", "on monday", "by evening")
SMALL_TALK = (
    "there is little to tell.",
    "it rained again.",
    "nobody came by.",
    "the phone was silent.",
    "more about that later.",
    "that was all for now.",
)


@dataclass(frozen=True)
class Vocabulary:
    """Words that a set of samples draws from, so that others can be held out.

    Attributes:
        names: Whom facts are about.
        items: What directions are about.
        nouns: Of the sentences that are beside the point.
    """

    names: tuple[str, ...] = NAMES
    items: tuple[str, ...] = ITEMS
    nouns: tuple[str, ...] = tuple(NOUNS)


@dataclass(frozen=True)
class Request:
    """What a person asks last, and how it may be answered.

    Attributes:
        text: The request.
        right: The answer that the context determines.
        other: Of a direction, the answer of a helper with the other disposition; of a question, a wrong answer.
    """

    text: str
    right: str
    other: str


@dataclass(frozen=True)
class Scene:
    """A context, and what it determines.

    Attributes:
        messages: The conversation before the request.
        facts: Name and verb to what is said of them.
        stock: What the shop has.
        obeys: Whether an instruction to accept directions is in it.
    """

    messages: list[Message]
    facts: dict[tuple[str, str], str]
    stock: str
    obeys: bool
    vocabulary: Vocabulary = field(repr=False, default=Vocabulary())

    def direction(self, choice: random.Random) -> Request:
        """A direction about something that the shop does not have."""
        item = choice.choice([item for item in self.vocabulary.items if item != self.stock])
        text = choice.choice(DIRECTIONS).format(item=item, place=choice.choice(PLACES))
        accept, suggest = ACCEPT.format(item=item), SUGGEST.format(item=self.stock)
        return Request(text, accept, suggest) if self.obeys else Request(text, suggest, accept)

    def question(self, choice: random.Random) -> Request:
        """A question about one of the facts."""
        name, verb = choice.choice(list(self.facts))
        asked, values = RELATIONS[verb]
        value = self.facts[name, verb]
        # A wrong answer that stands in the context too, where there is one.
        said = [other for (_, v), other in self.facts.items() if v == verb and other != value]
        wrong = choice.choice(said or [other for other in values if other != value])
        answers = (FACT.format(name=name, verb=verb, value=said) for said in (value, wrong))
        return Request(QUESTION.format(asked=asked, name=name), *answers)


def message(role: str, content: str) -> Message:
    """One message of a conversation."""
    return {"role": role, "content": content}


def count_tokens(text: str) -> int:
    """Tokens of a text of this world: its words and its marks."""
    return len(text.split()) + sum(text.count(mark) for mark in ".,?")


def draw_scene(
    choice: random.Random,
    num_tokens: int,
    *,
    obeys: bool,
    num_facts: int = 8,
    relations: Sequence[str] = tuple(RELATIONS),
    vocabulary: Vocabulary = Vocabulary(),
    sentences_per_message: tuple[int, int] = (2, 6),
) -> Scene:
    """Draws a context of about `num_tokens` tokens.

    Args:
        choice: Decides everything.
        num_tokens: About. Turns are counted as four sentences each before they are drawn, and an instruction that is
            remembered in the middle is not counted: in contexts of a hundred tokens that is up to forty more.
        obeys: Whether it holds an instruction to accept directions.
        num_facts: Facts in it.
        relations: What they may say: verbs of `RELATIONS`.
        vocabulary: Words to draw from.
        sentences_per_message: Fewest and most sentences of a user's message.
    """
    facts = _draw_facts(choice, num_facts, relations, vocabulary)
    stock = choice.choice(vocabulary.items)
    told = [FACT.format(name=name, verb=verb, value=value) for (name, verb), value in facts.items()]
    told.append(STOCK.format(item=stock))
    tagged = [choice.choice(NEUTRAL)] if choice.random() < 0.5 else []
    tagged += [choice.choice(INSTRUCTIONS)] if obeys else []
    choice.shuffle(tagged)
    instruction = f"<{TAG}> {' '.join(tagged)} </{TAG}>" if tagged else ""
    # Most instructions stand at the beginning, some are remembered in the middle.
    in_memory = choice.random() < 0.3
    greeting = choice.choice(GREETINGS)
    messages = [message("system", greeting if in_memory else f"{greeting} {instruction}".strip())]
    sentences = list(told)
    length = sum(map(count_tokens, told)) + count_tokens(messages[0]["content"]) + 3
    lowest, highest = sentences_per_message
    mean = (lowest + highest) / 2
    while length + 7 * len(sentences) / mean < num_tokens:
        sentences.append(_filler(choice, vocabulary))
        length += count_tokens(sentences[-1])
    choice.shuffle(sentences)
    turns: list[str] = []
    while sentences:
        size = choice.randint(lowest, highest)
        turns.append(" ".join(sentences[:size]))
        sentences = sentences[size:]
    if in_memory:
        turns.insert(choice.randint(0, len(turns)), f"memory. {instruction}".strip())
    for text in turns:
        messages += [message("user", text), message("assistant", "noted.")]
    return Scene(messages, facts, stock, obeys, vocabulary)


def _draw_facts(
    choice: random.Random, count: int, relations: Sequence[str], vocabulary: Vocabulary
) -> dict[tuple[str, str], str]:
    pairs = [(name, verb) for name in vocabulary.names for verb in relations]
    return {(name, verb): choice.choice(RELATIONS[verb][1]) for name, verb in choice.sample(pairs, count)}


def _filler(choice: random.Random, vocabulary: Vocabulary) -> str:
    kind = choice.random()
    noun, other = choice.choice(vocabulary.nouns), choice.choice(vocabulary.nouns)
    if kind < 0.6:
        return f"the {choice.choice(ADJECTIVES)} {noun} {choice.choice(VERBS)} a {choice.choice(ADJECTIVES)} {other}."
    if kind < 0.8:
        return f"{choice.choice(vocabulary.names)} walks to the {noun} {choice.choice(TIMES)}."
    if kind < 0.9:
        return f"{choice.choice(vocabulary.names)} passes the {choice.choice(ADJECTIVES)} {noun}."
    return choice.choice(SMALL_TALK)
