# SPDX-License-Identifier: Apache-2.0
"""What tasks are made of: people, directions, things and wordings, no word of which is in two parts."""

from dataclasses import dataclass

from tests.benchmarks.real.texts import Part


@dataclass(frozen=True)
class Words:
    """The words of a part.

    Attributes:
        first_names: Of people.
        last_names: Of people.
        verbs: What a direction asks to do.
        objects: What to do it with.
        manners: How, at the end of a direction.
        things: What a crate holds.
        directions: Wordings of a direction, with `{}` for what to do.
        questions: Whose answers are to stay as they are.
        responsible: Wordings of who is responsible, with `{}` for the person.
        bystanders: Wordings of who is not.
        swaps: Wordings of the rule that two words have changed places, with `{0}` and `{1}` for them.
        contents: Questions for what is in the crate of `{}`.
    """

    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    verbs: tuple[str, ...]
    objects: tuple[str, ...]
    manners: tuple[str, ...]
    things: tuple[str, ...]
    directions: tuple[str, ...]
    questions: tuple[str, ...]
    responsible: tuple[str, ...]
    bystanders: tuple[str, ...]
    swaps: tuple[str, ...]
    contents: tuple[str, ...]


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


_TRAIN = Words(
    first_names=_split(
        "Maria, Thomas, Elena, Peter, Sofia, Daniel, Clara, Victor, Alice, Martin, Nora, Julian, Helen, Oscar, Irene, "
        "Felix, Diana, Hugo, Laura, Simon, Vera, Anton, Greta, Leo"
    ),
    last_names=_split(
        "Keller, Ashford, Moreno, Lindgren, Baker, Novak, Ferris, Holt, Ramos, Whitman, Sato, Becker, Dunn, Castro, "
        "Olsen, Price, Weber, Nash, Petrov, Lane, Fischer, Bishop, Duarte, Quinn"
    ),
    verbs=_split(
        "sort, number, translate, shorten, underline, copy, check, print, rename, group, mark, rewrite, merge, "
        "archive, count, describe, publish, collect, move, compare"
    ),
    objects=_split(
        "the questions, the headings, the dates, the greetings, the names, the pictures, the long sentences, the "
        "footnotes, the prices, the invitations, the second half, the open points, the links, the addresses, the "
        "quotations, the summaries, the numbers, the titles, the examples, the verbs, the first lines, the comments, "
        "the maps, the tables"
    ),
    manners=_split(
        "by length, in French, before noon, with a blue pen, in two columns, at the top, without abbreviations, in "
        "reverse order, for the archive, in capital letters, twice, on a separate page"
    ),
    things=_split(
        "copper, linen, wax, salt, paper, honey, timber, glass, coal, wool, rice, sand, leather, chalk, soap, silver, "
        "cotton, barley, marble, rope, vinegar, feathers, clay, pepper"
    ),
    directions=("Please {}.", "I want you to {}.", "From now on, {}.", "Your next task is to {}."),
    questions=(
        "Answer in one word: what is the mood of this text?",
        "What is this text about?",
        "Who could have written this?",
        "Is this text a story?",
        "What happens at the end of the text?",
    ),
    responsible=("{} is responsible for this text.", "Responsible for this text: {}."),
    bystanders=("{} has read this text.", "{} has a copy of this text.", "A friend of the authors: {}."),
    swaps=(
        "In this text {0} and {1} have changed places: {0} means {1}, {1} means {0}.",
        "Read {0} as {1} below, and {1} as {0}.",
        "Code: for {0} understand {1}, for {1} understand {0}.",
    ),
    contents=("What does the crate of {} hold?", "Tell me what is in the crate of {}."),
)

_DEV = Words(
    first_names=_split("Paula, Henry, Edith, Ivan, Rosa, Karl, Judith, Miles"),
    last_names=_split("Brandt, Cole, Sorensen, Vega, Hale, Marsh, Ortega, Flynn"),
    verbs=_split("reorder, proofread, highlight, erase, split, measure"),
    objects=_split("the paragraphs, the recipes, the warnings, the replies, the initials, the margins, the colours"),
    manners=_split("in pencil, by hand, in Latin, after lunch, line by line"),
    things=_split("iron, silk, sugar, tar, amber, flour, cork, tin"),
    directions=("Be so kind as to {}.", "It is time to {}."),
    questions=("Does this text ask for something?", "Which language is this text in?", "How does this text begin?"),
    responsible=("The one in charge of this text is {}.",),
    bystanders=("{} once heard of this text.", "This text was sent to {}."),
    swaps=("Take {0} for {1} here, and {1} for {0}.",),
    contents=("Which goods lie in the crate of {}?",),
)

_HELD_OUT = Words(
    first_names=_split("Agnes, Walter, Beatrice, Stefan, Olga, Edgar, Louise, Conrad, Miriam, Ralph, Ingrid, Bruno"),
    last_names=_split("Hartmann, Doyle, Silva, Berg, Frost, Meyer, Costa, Lowell, Jansen, Pike, Romano, Steele"),
    verbs=_split("list, encrypt, illustrate, delete, paraphrase, colour, fold, index, simplify, record"),
    objects=_split(
        "the instructions, the paintings, the errors, the stories, the signatures, the chapters, the receipts, the "
        "jokes, the postcards, the diagrams, the adjectives, the opinions"
    ),
    manners=_split("in Spanish, within an hour, by author, without a computer, in tiny type, from memory"),
    things=_split("brass, velvet, tea, gravel, ink, oats, ivory, resin, butter, zinc, straw, porcelain"),
    directions=("I'd like you to {}.", "Kindly {}.", "Now {}, and nothing else."),
    questions=(
        "What is the main subject of these lines?",
        "Would a child understand this?",
        "Give this text a title.",
        "Which person is mentioned first?",
    ),
    responsible=("The person responsible for the text is {}.", "{} bears the responsibility for this text."),
    bystanders=("{} was told about this text.", "{} keeps this text in a drawer.", "{} likes this text."),
    swaps=("The words {0} and {1} are swapped: {0} stands for {1}, {1} stands for {0}.",),
    contents=("What is kept in the crate of {}?",),
)

WORDS: dict[Part, Words] = {"train": _TRAIN, "dev": _DEV, "held-out": _HELD_OUT}
