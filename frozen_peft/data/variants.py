# SPDX-License-Identifier: Apache-2.0
"""Context variants for one decision, so that a habit does not hang on one wording.

1. A context is seen in full, with the instructions that were stripped from it, as *units*: what is independent of its
   surroundings, by a field, by its role, or as a whole exchange; and every other message, which stays where it is.
   From the last user message on, which the decision answers, nothing is ever dropped or moved.
2. A variant drops units, rewords sentences, moves units into each other's places and inserts unrelated ones. What was
   stripped moves along with its message and is never dropped or reworded, so that restoring a variant gives the varied
   context with its instructions.
3. The first variant is the sample itself, and no two have the same context. What is drawn depends on the seed and on
   the sample's content alone, not on other samples or their order.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frozen_peft.data.conversation import Message, split_sample, with_context
from frozen_peft.data.marks import Marks
from frozen_peft.data.paraphrases import Paraphrases
from frozen_peft.data.pieces import STRIPPED, MarkedMessage, marked_context, stripped_context, with_text
from frozen_peft.data.row_checks import require_messages, require_value
from frozen_peft.data.rows import Row, read_rows

__all__ = ["DEFAULT_INDEPENDENT", "VariantSettings", "read_units", "vary_context"]

# Messages with `"independent": true`.
DEFAULT_INDEPENDENT = Marks(fields=("independent",))

# Draws that may give nothing new, for each variant wanted, before a sample is taken to have no more.
_DRAWS_PER_VARIANT = 20


@dataclass(frozen=True)
class VariantSettings:
    """How the contexts of a sample's variants differ.

    Attributes:
        num_variants: How many contexts a decision gets, its own included; fewer where there are no more.
        drop: Probability with which an independent unit is left out. One that holds stripped instructions stays.
        shuffle: Bring independent units into random order, in the places they have.
        swaps: So many times, let two random independent units change places.
        insert: Unrelated units; each is one message, or an exchange that begins with a user's.
        max_inserts: At most so many of them go into a variant. An exchange goes in before a user message, a single
            message there or beside an independent one; never before a first system message.
        paraphrases: Alternatives to whole sentences and messages. For each text that has some, one of them or the text
            itself is drawn once per variant.
        keep_instructions: Probability with which a stripped piece stays in the visible context, so that only some of
            the instructions are stripped; at least one always is.
        independent: Which messages are independent, each by itself: by a field, a role or a predicate.
        independent_exchanges: So is, as a whole, a user's message with what follows up to the assistant's last answer
            to it.

    Raises:
        ValueError: A setting is out of range, or there are variants to make and nothing to vary.
    """

    num_variants: int = 1
    drop: float = 0.0
    shuffle: bool = False
    swaps: int = 0
    insert: Sequence[Sequence[Message]] = ()
    max_inserts: int = 1
    paraphrases: Paraphrases | None = None
    keep_instructions: float = 0.0
    independent: Marks = DEFAULT_INDEPENDENT
    independent_exchanges: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_variants", 1), ("swaps", 0), ("max_inserts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected {least} or more")
        for name in ("drop", "keep_instructions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a probability, from 0 to 1")
        for messages in self.insert:
            _require_unit(messages)
        if self.independent.reach_into_text:
            raise ValueError("`independent` has a tag or a pattern; it is whole messages that are independent")
        ways = (self.drop, self.shuffle, self.swaps, self.insert, self.paraphrases, self.keep_instructions)
        if self.num_variants > 1 and not any(ways):
            raise ValueError(
                f"{self.num_variants} variants, and nothing to vary: give `drop`, `shuffle`, `swaps`, `insert`, "
                "`paraphrases` or `keep_instructions`"
            )


@dataclass(frozen=True)
class _Unit:
    messages: tuple[MarkedMessage, ...]
    independent: bool

    @property
    def holds_instructions(self) -> bool:
        return any(entry.whole or entry.stretches for entry in self.messages)

    @property
    def first_role(self) -> str:
        return self.messages[0].message["role"]


def read_units(path: Path) -> list[list[Message]]:
    """Reads unrelated units: rows `{"role": ..., "content": ...}`, or `{"messages": [...]}` for an exchange.

    Raises:
        ValueError: A row is neither, an exchange does not begin with a user, or there are no rows.
        FileNotFoundError: There is no such file.
    """
    return list(read_rows(path, _unit_of_row, empty="the file has no messages"))


def vary_context(sample: dict[str, Any], settings: VariantSettings, seed: int = 0) -> list[dict[str, Any]]:
    """Gives a sample's decision other contexts.

    Args:
        sample: A row of any form that `data.conversation` lists, stripped or not.
        settings: How the contexts differ.
        seed: Another seed draws other variants.

    Returns:
        The sample itself, then its variants: at most `num_variants` rows, whose contexts all differ. Decisions are the
        sample's own object, and other columns stay as they are.

    Raises:
        ValueError: The row is no sample, its `stripped` does not fit it, or it is text and the settings need messages.
    """
    split = split_sample(sample)
    is_text = isinstance(split.context, str)
    if is_text and (settings.drop or settings.shuffle or settings.swaps or settings.insert):
        raise ValueError(
            f"`{split.column}` is text: of its variants only `paraphrases` and `keep_instructions` differ, the other "
            "settings need messages"
        )
    marked = marked_context(split.context, sample.get(STRIPPED))
    content = json.dumps([split.context, split.decision, sample.get(STRIPPED)], sort_keys=True)
    samples = [sample]
    seen = {json.dumps(split.context, sort_keys=True)}
    for draw in range(_DRAWS_PER_VARIANT * (settings.num_variants - 1)):
        if len(samples) == settings.num_variants:
            break
        dice = _Dice(f"{seed}/{draw}/{content}")
        varied = marked if is_text else _rearranged(marked, settings, dice)
        varied = _reworded(varied, settings.paraphrases, dice) if settings.paraphrases else varied
        context, pieces = stripped_context(_keep_some(varied, settings.keep_instructions, dice), text=is_text)
        key = json.dumps(context, sort_keys=True)
        if key not in seen:
            seen.add(key)
            variant = with_context(sample, context)
            samples.append({**variant, STRIPPED: pieces} if STRIPPED in sample else variant)
    return samples


class _Dice:
    """Random draws, the same on every machine and in every version of Python: of `random` only `random()` is."""

    def __init__(self, seed: str) -> None:
        # The surrogate halves that JSON can hold are escaped by `json.dumps`.
        self._random = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest()))

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def some(self, items: Sequence[Any], count: int) -> list[Any]:
        """So many of the items, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(min(count, len(rest)))]


def _rearranged(marked: Sequence[MarkedMessage], settings: VariantSettings, dice: _Dice) -> list[MarkedMessage]:
    """Drops, moves and inserts units."""
    units = [
        unit
        for unit in _units(marked, settings)
        if not (unit.independent and dice.chance(settings.drop) and not unit.holds_instructions)
    ]
    places = [place for place, unit in enumerate(units) if unit.independent]
    if settings.shuffle:
        for place, unit in zip(places, dice.some([units[place] for place in places], len(places)), strict=True):
            units[place] = unit
    for _ in range(settings.swaps if len(places) > 1 else 0):
        one, other = dice.some(places, 2)
        units[one], units[other] = units[other], units[one]
    _insert(units, settings, dice)
    return [entry for unit in units for entry in unit.messages]


def _units(marked: Sequence[MarkedMessage], settings: VariantSettings) -> list[_Unit]:
    """The context as units; from the last user message on, one that is not independent."""
    users = [number for number, entry in enumerate(marked) if entry.message["role"] == "user"]
    # Where nobody asks, the decision answers the last message.
    last = users[-1] if users else len(marked) - 1
    units: list[_Unit] = []
    turn: list[MarkedMessage] = []  # a user's message and what follows it
    for number, entry in enumerate(marked[:last]):
        alone = settings.independent.cover(entry.message, f"message {number} of the context")
        if alone or entry.message["role"] == "user":
            units += _turn_units(turn, settings)
            turn = []
        if alone:
            units.append(_Unit((entry,), independent=True))
        else:
            turn.append(entry)
    return [*units, *_turn_units(turn, settings), _Unit(tuple(marked[last:]), independent=False)]


def _turn_units(turn: Sequence[MarkedMessage], settings: VariantSettings) -> list[_Unit]:
    """An exchange as one unit where exchanges are independent, every other message as one that is not."""
    answers = [
        number
        for number, entry in enumerate(turn)
        if entry.message["role"] == "assistant" and not entry.message.get("tool_calls")
    ]
    end = answers[-1] + 1 if answers else 0
    rest = turn[end:]
    # A call that is still to be answered belongs to what comes before it.
    open_call = any(entry.message["role"] in ("assistant", "tool") for entry in rest)
    if not (settings.independent_exchanges and end and turn[0].message["role"] == "user" and not open_call):
        return [_Unit((entry,), independent=False) for entry in turn]
    return [_Unit(tuple(turn[:end]), independent=True), *(_Unit((entry,), independent=False) for entry in rest)]


def _insert(units: list[_Unit], settings: VariantSettings, dice: _Dice) -> None:
    """Puts unrelated units in, none that is there already."""
    for _ in range(dice.below(settings.max_inserts + 1) if settings.insert else 0):
        messages = settings.insert[dice.below(len(settings.insert))]
        if any(entry.message == messages[0] for unit in units for entry in unit.messages):
            continue
        gaps = [gap for gap in range(len(units)) if _fits(units, gap, exchange=len(messages) > 1)]
        if gaps:
            unit = _Unit(tuple(MarkedMessage(message) for message in messages), independent=True)
            units.insert(gaps[dice.below(len(gaps))], unit)


def _fits(units: Sequence[_Unit], gap: int, *, exchange: bool) -> bool:
    """Whether something unrelated may go in before a unit."""
    if gap == 0 and units[0].first_role == "system":
        return False
    if units[gap].first_role == "user":
        return True
    return not exchange and (units[gap].independent or (gap > 0 and units[gap - 1].independent))


def _reworded(marked: Sequence[MarkedMessage], paraphrases: Paraphrases, dice: _Dice) -> list[MarkedMessage]:
    """Rewords what is not stripped."""
    wordings: dict[str, str] = {}

    def wording(text: str) -> str:
        if text not in wordings:
            choices = [text, *paraphrases.alternatives[text]]
            wordings[text] = choices[dice.below(len(choices))]
        return wordings[text]

    return [entry if entry.whole else _reworded_message(entry, paraphrases, wording) for entry in marked]


def _reworded_message(entry: MarkedMessage, paraphrases: Paraphrases, wording: Callable[[str], str]) -> MarkedMessage:
    message = entry.message
    moved: list[tuple[int, int, int]] = []
    for part, text, stretches in entry.texts():
        text, stretches = paraphrases.reword(text, stretches, wording)
        moved += [(part, *stretch) for stretch in stretches]
        message = with_text(message, part, text)
    return MarkedMessage(message, stretches=tuple(moved))


def _keep_some(marked: Sequence[MarkedMessage], probability: float, dice: _Dice) -> list[MarkedMessage]:
    """Leaves some of the stripped pieces visible, never all."""
    pieces = [
        (number, stretch)
        for number, entry in enumerate(marked)
        for stretch in ([None] if entry.whole else entry.stretches)
    ]
    kept = [piece for piece in pieces if dice.chance(probability)]
    if kept and len(kept) == len(pieces):
        kept.pop(dice.below(len(kept)))
    return [
        replace(
            entry,
            whole=entry.whole and (number, None) not in kept,
            stretches=tuple(stretch for stretch in entry.stretches if (number, stretch) not in kept),
        )
        for number, entry in enumerate(marked)
    ]


def _unit_of_row(row: Row) -> list[Message]:
    if "messages" not in row.values:
        require_messages([row.values], "message")
        return [row.values]
    messages: list[Message] = row.values["messages"]
    require_value(messages, "messages")
    _require_unit(messages)
    return messages


def _require_unit(messages: Sequence[Message]) -> None:
    """The messages of a unit are one, or an exchange."""
    if len(messages) > 1 and messages[0]["role"] != "user":
        raise ValueError(f"an exchange begins with a user's message, this one with role {messages[0]['role']!r}")
