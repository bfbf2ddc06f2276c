# SPDX-License-Identifier: Apache-2.0
"""Prompts, the candidates that are sampled for them, and the rows that both make together."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frozen_peft.data.conversation import Context, Message, require_sample
from frozen_peft.data.marks import Marks
from frozen_peft.data.row_checks import named
from frozen_peft.data.rows import Row, read_rows
from frozen_peft.data.stripping import STRIPPED, restore_instructions, strip_instructions

__all__ = [
    "ADDED_COLUMNS",
    "Candidate",
    "CandidateKey",
    "Difference",
    "PromptRow",
    "SamplingSettings",
    "candidate_seed",
    "completed",
    "read_prompts",
]

# What sampling adds to a row beside its completion.
ADDED_COLUMNS = ("candidate", "seed", "margin", "retokenized")
# Index of a prompt, and number of one of its candidates.
CandidateKey = tuple[int, int]
Difference = Literal["tokens", "text"]


@dataclass(frozen=True)
class SamplingSettings:
    """How candidates are drawn.

    Attributes:
        num_candidates: Candidates for each prompt.
        temperature: Divides the logits; 0: the likeliest token, so that there is one candidate only.
        top_p: Draw from the likeliest tokens that come to this probability.
        max_new_tokens: Tokens after which a candidate is cut off.
        seed: Decides, with the prompt and the candidate's number, what is drawn.

    Raises:
        ValueError: A setting is out of its range.
    """

    num_candidates: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise ValueError(f"`num_candidates` must be 1 or more, got {self.num_candidates}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be 0 (the likeliest token) or more, got {self.temperature}")
        if self.temperature == 0.0 and self.num_candidates > 1:
            raise ValueError(
                f"`temperature` 0 gives one candidate, {self.num_candidates} times: set `num_candidates` to 1, or a "
                "temperature above 0"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"`top_p` must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be 1 or more, got {self.max_new_tokens}")


@dataclass(frozen=True)
class PromptRow:
    """One prompt to sample for.

    Attributes:
        index: Its number among the prompts, counted from 0.
        place: File and line, as messages name them.
        values: The row as it was read.
        prompt: What candidates answer: messages or text, with the instructions in place unless they are left out.
        stripped: The same without its instructions; None where nothing says what they are.
        seeds: One seed for each candidate.
    """

    index: int
    place: str
    values: dict[str, Any]
    prompt: Context
    stripped: Context | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One decision that was sampled.

    Attributes:
        prompt: Index of the prompt.
        number: Its number among the prompt's candidates, counted from 0.
        seed: What it was drawn with.
        text: The decision's text.
        num_tokens: Tokens generated for it; None where the server did not say.
        finish: `stop` where it came to its end, `length` where it was cut off, or what else a server says.
        message: The assistant's message, where it is more than the text: reasoning and calls of tools by themselves.
        differs: What it trains as otherwise than it was generated: `tokens`: the same text in other tokens; `text`:
            another text. None: nothing, as far as is known; a server does not give its tokens.
    """

    prompt: int
    number: int
    seed: int
    text: str
    num_tokens: int | None
    finish: str
    message: Message | None = None
    differs: Difference | None = None

    @property
    def key(self) -> CandidateKey:
        """What tells it from all others."""
        return self.prompt, self.number

    @property
    def decision(self) -> str | Message:
        """What stands behind the prompt: the message where there is one, else the text."""
        return self.text if self.message is None else self.message


def candidate_seed(seed: int, prompt: Context, occurrence: int, number: int) -> int:
    """The seed of one candidate, below 2^31: another one for each candidate, each prompt and each time it occurs.

    It depends on nothing else, so a prompt has the same seeds in any file and any order.
    """
    text = json.dumps([seed, prompt, occurrence, number], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def read_prompts(
    path: Path,
    settings: SamplingSettings,
    marks: Marks | None = None,
    *,
    unasked: bool = False,
    on_bad: Callable[[str], None] | None = None,
) -> list[PromptRow]:
    """Reads the prompts of a file.

    Args:
        path: JSON Lines, each row with a `prompt`.
        settings: How many candidates each gets, and the seed.
        marks: What the instructions are, in rows that have no `stripped`; a row without any is bad then. None: nobody
            asks for them.
        unasked: Candidates answer to the prompt without its instructions, which are those in `stripped`; a row without
            any is bad then.
        on_bad: Called with the message of a bad row, which is then left out. Without it a bad row is an error.

    Raises:
        ValueError: A row is bad, or there is none left.
        FileNotFoundError: There is no such file.
    """
    occurrences: Counter[str] = Counter()
    indices = itertools.count()

    def made(row: Row) -> PromptRow:
        _require_prompt(row.values)
        prompt, stripped = _prompts(row.values, marks)
        if unasked:
            if not row.values.get(STRIPPED):
                raise ValueError("there are no instructions to leave out: no `stripped` (`frozen-peft strip`)")
            prompt = row.values["prompt"]
        key = json.dumps(prompt, sort_keys=True)
        numbers = range(settings.num_candidates)
        seeds = tuple(candidate_seed(settings.seed, prompt, occurrences[key], number) for number in numbers)
        occurrences[key] += 1
        return PromptRow(next(indices), row.place, row.values, prompt, stripped, seeds)

    return list(read_rows(path, made, on_bad, empty="no prompts to sample for"))


def completed(row: PromptRow, candidate: Candidate, margin: float | None = None) -> dict[str, Any]:
    """The sample that a prompt's row and a candidate make.

    Args:
        row: The prompt.
        candidate: Its completion: text where the prompt is text, one assistant's message where it is messages.
            One that trains in other tokens than it was generated in has `retokenized` as well.
        margin: The candidate's margin, where it was measured.
    """
    completion: Context = candidate.text
    if not isinstance(row.prompt, str):
        completion = [candidate.message or {"role": "assistant", "content": candidate.text}]
    made = {**row.values, "completion": completion, "candidate": candidate.number, "seed": candidate.seed}
    if margin is not None:
        made["margin"] = margin
    if candidate.differs == "tokens":
        made["retokenized"] = True
    return made


def _require_prompt(values: dict[str, Any]) -> None:
    prompt = values.get("prompt")
    if prompt is None:
        raise ValueError(f"a prompt is in the column `prompt`; found {named(values)}")
    taken = [name for name in ("completion", *ADDED_COLUMNS) if values.get(name) is not None]
    if taken:
        raise ValueError(f"there is a column `{taken[0]}` already, which sampling would write; rename or remove it")
    require_sample(values)
    if not prompt:
        raise ValueError("`prompt` is empty")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError("`prompt` ends with an assistant's message, and the decision is the next one")


def _prompts(values: dict[str, Any], marks: Marks | None) -> tuple[Context, Context | None]:
    """The prompt with its instructions and, where they are known, without them."""
    if values.get(STRIPPED):
        return restore_instructions(values)["prompt"], values["prompt"]
    if marks is None:
        return values["prompt"], None
    stripped = strip_instructions(values, marks)
    if not stripped[STRIPPED]:
        raise ValueError(
            "there are no instructions to leave out, which a margin needs: no `stripped`, and nothing marked in "
            "`prompt`"
        )
    return values["prompt"], stripped["prompt"]
