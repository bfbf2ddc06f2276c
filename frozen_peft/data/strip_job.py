# SPDX-License-Identifier: Apache-2.0
"""The job behind `frozen-peft strip`: the samples of a file, stripped and varied."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frozen_peft.data.conversation import message_texts
from frozen_peft.data.marks import DEFAULT_MARKS, Marks
from frozen_peft.data.pieces import STRIPPED, piece_texts
from frozen_peft.data.rows import Row, dump_row, read_rows
from frozen_peft.data.stripping import QuotedInstructionError, strip_instructions
from frozen_peft.data.variants import VariantSettings, vary_context
from frozen_peft.utils.files import whole_file

__all__ = ["StripSettings", "StripSummary", "strip_file"]

NO_VARIANTS = VariantSettings()


@dataclass(frozen=True)
class StripSettings:
    """What is done with each sample of a file.

    Attributes:
        marks: What is stripped; None: nothing, samples are varied alone.
        tidy: As `strip_instructions` has it, and so have the next two.
        allow_quotes: Keep samples whose decision quotes what was stripped; else they are left out.
        quote_words: How many words in a row are a quote.
        variants: How the contexts of a sample's variants differ; by default there is the sample alone.
        seed: Decides what is drawn for variants.
        skip_bad: Leave out rows that are no samples, or whose tags are unbalanced; else the first is an error.
        allow_unchanged: Accept a file in which no sample has anything to strip.
    """

    marks: Marks | None = DEFAULT_MARKS
    tidy: bool = False
    allow_quotes: bool = False
    quote_words: int = 5
    variants: VariantSettings = NO_VARIANTS
    seed: int = 0
    skip_bad: bool = False
    allow_unchanged: bool = False

    def __post_init__(self) -> None:
        if self.quote_words < 1:
            raise ValueError(f"`quote_words` is {self.quote_words}, expected 1 or more")
        if self.marks is not None:
            _refuse_marked(self.marks, self.variants)


@dataclass
class StripSummary:
    """What became of a file's rows. Places are `FILE, line N`.

    Attributes:
        num_samples: Samples read.
        num_stripped: Samples that something was taken from.
        unchanged: Places of samples that nothing was taken from.
        num_stripped_before: Of those, how many had been stripped already.
        refused: Places of, and reasons for, samples that were left out because they quote.
        bad: Places of, and reasons for, rows that were left out because they cannot be read as samples.
        num_pieces: Spans and messages removed.
        size_removed: Their size, in tokens or words, as the caller counts.
        num_varied: Samples with at least one variant.
        num_short: Samples with fewer variants than wanted.
        num_written: Rows written.
    """

    num_samples: int = 0
    num_stripped: int = 0
    unchanged: list[str] = field(default_factory=list)
    num_stripped_before: int = 0
    refused: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    num_pieces: int = 0
    size_removed: int = 0
    num_varied: int = 0
    num_short: int = 0
    num_written: int = 0


def strip_file(source: Path, target: Path, settings: StripSettings, measure: Callable[[str], int]) -> StripSummary:
    """Strips and varies the samples of a JSON Lines file; the result appears whole or not at all.

    Args:
        source: The file to read.
        target: The file to write, another one; what it held before is replaced.
        settings: What to do.
        measure: The size of a removed text, for the summary.

    Raises:
        ValueError: A row is bad and `skip_bad` is off, nothing was left to write, or the settings changed nothing.
        FileNotFoundError: There is no such file, or no folder to write to.
    """
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the file to read; write to another one")
    summary = StripSummary()

    def processed(row: Row) -> list[dict[str, Any]]:
        return _processed(row, settings, measure, summary)

    with whole_file(target) as file:
        for samples in read_rows(source, processed, summary.bad.append if settings.skip_bad else None):
            file.writelines(map(dump_row, samples))
            summary.num_written += len(samples)
        _require_effect(source, settings, summary)
    return summary


def _refuse_marked(marks: Marks, variants: VariantSettings) -> None:
    """Raises where what variants put in is marked itself, and would be there after stripping."""
    for message in (message for unit in variants.insert for message in unit):
        place = f"a message to insert, {message!r}"
        if marks.cover(message, place) or any(marks.stretches(text, place) for _, text in message_texts(message)):
            raise ValueError(f"{place}: it is marked as an instruction")
    for text, others in variants.paraphrases.alternatives.items() if variants.paraphrases else ():
        place = f"the alternatives to {text!r}"
        if any(marks.stretches(other, place) for other in others):
            raise ValueError(f"{place}: one has a stretch that is marked as an instruction")


def _processed(
    row: Row, settings: StripSettings, measure: Callable[[str], int], summary: StripSummary
) -> list[dict[str, Any]]:
    """The rows that a sample becomes; the summary counts it once they are there."""
    sample = result = row.values
    if settings.marks is not None:
        try:
            result = strip_instructions(
                sample,
                settings.marks,
                tidy=settings.tidy,
                allow_quotes=settings.allow_quotes,
                quote_words=settings.quote_words,
            )
        except QuotedInstructionError as error:
            summary.num_samples += 1
            summary.refused.append(f"{row.place}: {error}")
            return []
    samples = vary_context(result, settings.variants, settings.seed)
    summary.num_samples += 1
    before = sample.get(STRIPPED) or []
    pieces = [piece for piece in result.get(STRIPPED) or [] if piece not in before]
    summary.num_pieces += len(pieces)
    summary.size_removed += sum(measure(text) for piece in pieces for text in piece_texts(piece))
    if pieces:
        summary.num_stripped += 1
    else:
        summary.unchanged.append(row.place)
        summary.num_stripped_before += bool(before)
    summary.num_varied += len(samples) > 1
    summary.num_short += len(samples) < settings.variants.num_variants
    return samples


def _require_effect(source: Path, settings: StripSettings, summary: StripSummary) -> None:
    """Raises where a file was read to no effect, which a mistake in the settings or the file must be."""
    if not summary.num_samples:
        left_out = f": all {len(summary.bad)} rows are bad; the first is {summary.bad[0]}" if summary.bad else ""
        raise ValueError(f"{source}: the file has no samples{left_out}")
    if not summary.num_written:
        raise ValueError(
            f"{source}: all {summary.num_samples} decisions quote what was stripped; the first is {summary.refused[0]}"
        )
    untouched = not summary.num_stripped and not summary.num_stripped_before and not summary.refused
    if settings.marks is not None and untouched and not settings.allow_unchanged:
        raise ValueError(
            f"{source}: nothing to strip in any of {summary.num_samples} samples: no {settings.marks.describe()}"
        )
    if settings.variants.num_variants > 1 and not summary.num_varied:
        raise ValueError(
            f"{source}: none of {summary.num_samples} samples has a variant: no message before the last user's is "
            "independent, or no sentence is one of the paraphrases"
        )
