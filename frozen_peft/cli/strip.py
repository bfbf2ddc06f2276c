# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft strip`: instructions out of contexts, and variants of these.

Removes marked instructions from the contexts of samples and leaves the decisions untouched. What was removed stays in
the row, in the column `stripped`: `frozen_peft.data.restore_instructions` gives the exact sample before.

A row is {"prompt": [messages], "completion": [messages]}, {"prompt": text, "completion": text}, or
{"messages": [...]}, whose decision is the last message; a pair (`prompt`, `chosen`, `rejected`), a probe or a prompt
alone will do too.

Marks add up. Without any, <instruction> tags and messages with "instruction": true are marked. Exactly what is marked
goes, white space around it stays unless --tidy; a message with no text left goes as a whole. Rows that were stripped
before may be stripped again: the same marks change nothing, other ones add to what is stripped.

A sample whose decision quotes what was stripped is refused, that is left out and counted: so many words in a row in
common, or all words of an instruction of at least three.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from frozen_peft.cli.arguments import CommandParser, given_marks
from frozen_peft.cli.errors import reported
from frozen_peft.data import (
    DEFAULT_INDEPENDENT,
    DEFAULT_MARKS,
    StripSettings,
    StripSummary,
    VariantSettings,
    read_paraphrases,
    read_units,
    strip_file,
)
from frozen_peft.demo import model_source
from frozen_peft.utils.tables import aligned

__all__ = ["run"]

# How many places of each kind the summary lists.
_NUM_PLACES = 5

_VARIANTS = """\
Several contexts for each decision, the sample's own first. Nothing is dropped or moved from the last user message on,
and no instruction is lost: restoring a variant gives the varied context with the instructions still in it."""

_INDEPENDENT = 'What may be dropped or moved. Without any of these: messages with "independent": true.'


def run(arguments: Sequence[str]) -> None:
    """Strips a file and prints what was done.

    Args:
        arguments: Command-line arguments after `strip`.

    Raises:
        CommandError: An argument or a row cannot be used; nothing was written.
    """
    parser = _parser()
    options = parser.read(arguments)
    with reported():
        _refuse_idle(parser, options)
        settings = _settings(options)
        measure, unit = _measure(options.tokenizer)
        summary = strip_file(options.source, options.target, settings, measure)
    print(_table(summary, settings, unit, options.target))


def _parser() -> CommandParser:
    parser = CommandParser("strip", __doc__)
    parser.add_argument("source", metavar="IN.jsonl", type=Path, help="samples, one a line")
    parser.add_argument("target", metavar="OUT.jsonl", type=Path, help="where the result goes, whole or not at all")
    parser.add_marks("Each may be given several times.")
    parser.section("stripping")
    parser.option("no_strip", "strip nothing, only make variants", False)
    parser.option("tidy", "where two runs of white space would meet, remove the lesser one too", False)
    parser.option("allow_quotes", "keep samples that quote what was stripped", False)
    parser.option("quote_words", "words in a row that are a quote", 5)
    parser.option("allow_unchanged", "accept a file with nothing to strip in it", False)
    parser.option("skip_bad", "leave out malformed rows, name them, do the rest", False)
    parser.option("tokenizer", "count what is removed in this model's tokens (default: in words)", metavar="ID_OR_DIR")
    parser.section("variants", _VARIANTS)
    parser.option("variants", "contexts per decision", 1)
    parser.option("seed", "draws other variants", 0)
    parser.option("drop", "leave independent messages out with probability P", 0.0, metavar="P")
    parser.option("shuffle", "bring independent messages into random order", False)
    parser.option("swaps", "let two independent messages change places, N times", 0)
    text = 'put in unrelated messages; rows are these, or {"messages": [...]}'
    parser.option("insert", text, metavar="FILE", type=Path)
    parser.option("max_inserts", "at most N of them at once", 1)
    text = 'reword whole sentences and messages; rows are {"text": ..., "alternatives": [...]}'
    parser.option("paraphrases", text, metavar="FILE", type=Path)
    parser.option("keep_instructions", "leave each instruction in with probability P, never all", 0.0, metavar="P")
    parser.section("independent messages", _INDEPENDENT)
    parser.option("independent_field", 'messages with "NAME": true', metavar="NAME", action="append")
    parser.option("independent_role", "messages of that role", metavar="ROLE", action="append")
    text = "messages that F(message) is true of"
    parser.option("independent_predicate", text, metavar="FILE.py:F", action="append")
    parser.option("independent_exchanges", "a user's message and the answer to it, as one", False)
    return parser


def _refuse_idle(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuses options that do nothing beside the others."""
    if options.no_strip:
        stripping = ("tag", "field", "role", "regex", "predicate", "tidy", "allow_quotes", "quote_words")
        parser.refuse_idle(options, (*stripping, "allow_unchanged", "tokenizer"), "with --no-strip")
    if options.variants == 1:
        varying = ("drop", "shuffle", "swaps", "insert", "paraphrases", "keep_instructions", "seed")
        parser.refuse_idle(options, ("no_strip", *varying), "without --variants above 1")
    if not (options.drop or options.shuffle or options.swaps or options.insert):
        independent = [name for name in vars(options) if name.startswith("independent_")]
        parser.refuse_idle(options, independent, "without --drop, --shuffle, --swaps or --insert")
    if not options.insert:
        parser.refuse_idle(options, ["max_inserts"], "without --insert")


def _settings(options: argparse.Namespace) -> StripSettings:
    marks = given_marks(options) or DEFAULT_MARKS
    return StripSettings(
        marks=None if options.no_strip else marks,
        tidy=options.tidy,
        allow_quotes=options.allow_quotes,
        quote_words=options.quote_words,
        variants=VariantSettings(
            num_variants=options.variants,
            drop=options.drop,
            shuffle=options.shuffle,
            swaps=options.swaps,
            insert=read_units(options.insert) if options.insert else (),
            max_inserts=options.max_inserts,
            paraphrases=read_paraphrases(options.paraphrases) if options.paraphrases else None,
            keep_instructions=options.keep_instructions,
            independent=given_marks(options, "independent_") or DEFAULT_INDEPENDENT,
            independent_exchanges=options.independent_exchanges,
        ),
        seed=options.seed,
        skip_bad=options.skip_bad,
        allow_unchanged=options.allow_unchanged,
    )


def _measure(tokenizer_name: str | None) -> tuple[Callable[[str], int], str]:
    """How removed text is counted, and in what."""
    if tokenizer_name is None:
        return lambda text: len(text.split()), "words"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_source(tokenizer_name))
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), "tokens"


def _table(summary: StripSummary, settings: StripSettings, unit: str, target: Path) -> str:
    """What was done, in aligned lines, and the first places of what was not."""
    rows = [("samples", summary.num_samples, "")]
    places = [("bad", summary.bad)]
    if settings.marks is not None:
        rows += [
            ("stripped", summary.num_stripped, ""),
            ("unchanged", len(summary.unchanged), _why_unchanged(summary)),
            ("refused", len(summary.refused), "left out: they quote what was stripped" if summary.refused else ""),
            ("spans removed", summary.num_pieces, "messages and stretches of text"),
            (f"{unit} removed", summary.size_removed, ""),
        ]
        places = [("unchanged", summary.unchanged), ("refused", summary.refused), *places]
    if settings.skip_bad:
        rows.append(("bad rows", len(summary.bad), "left out" if summary.bad else ""))
    if settings.variants.num_variants > 1:
        wanted = settings.variants.num_variants
        short = f"{summary.num_short:,} samples have no {wanted} contexts that differ" if summary.num_short else ""
        rows.append(("samples varied", summary.num_varied, short))
    rows.append(("rows written", summary.num_written, str(target)))
    lines = aligned([(title, f"{count:,}", note) for title, count, note in rows], right=[1])
    for title, found in places:
        lines += [f"  {title}: {place}" for place in found[:_NUM_PLACES]]
        if len(found) > _NUM_PLACES:
            lines.append(f"  {title}: and {len(found) - _NUM_PLACES:,} more")
    return "\n".join(lines)


def _why_unchanged(summary: StripSummary) -> str:
    if not summary.unchanged:
        return ""
    before = f", {summary.num_stripped_before:,} stripped before" if summary.num_stripped_before else ""
    return f"kept as they are: nothing to strip{before}"
