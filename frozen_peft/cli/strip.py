# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft strip`: instructions out of contexts, and variants of these."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frozen_peft.cli.demo import model_source
from frozen_peft.cli.errors import reported
from frozen_peft.cli.functions import load_function
from frozen_peft.data import (
    DEFAULT_INDEPENDENT,
    DEFAULT_MARKS,
    Marks,
    StripSettings,
    StripSummary,
    VariantSettings,
    read_paraphrases,
    read_units,
    strip_file,
)

__all__ = ["run"]

# How many places of each kind the summary lists.
_NUM_PLACES = 5

_DESCRIPTION = """\
Removes marked instructions from the contexts of samples and leaves the decisions untouched. What was removed stays in
the row, in the column `stripped`: `frozen_peft.behavior.restore_instructions` gives the exact sample before.

A row is {"prompt": [messages], "completion": [messages]}, {"prompt": text, "completion": text}, or
{"messages": [...]}, whose decision is the last message; a probe or a prompt alone will do too.

Marks add up. Without any, <instruction> tags and messages with "instruction": true are marked. Exactly what is marked
goes, white space around it stays unless --tidy; a message with no text left goes as a whole. Rows that were stripped
before may be stripped again: the same marks change nothing, other ones add to what is stripped.

A sample whose decision quotes what was stripped is refused, that is left out and counted: so many words in a row in
common, or all words of an instruction of at least three."""

_VARIANTS = """\
Several contexts for each decision, the sample's own first. Nothing is dropped or moved from the last user message on,
and no instruction is lost: restoring a variant gives the varied context with the instructions still in it."""


def run(arguments: Sequence[str]) -> None:
    """Strips a file and prints what was done.

    Args:
        arguments: Command-line arguments after `strip`.

    Raises:
        CommandError: An argument or a row cannot be used; nothing was written.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    with reported():
        settings = _settings(options)
        measure, unit = _measure(options.tokenizer)
    with reported():
        summary = strip_file(options.source, options.target, settings, measure)
    print(_table(summary, settings, unit, options.target))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft strip",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN.jsonl", type=Path, help="samples, one a line")
    parser.add_argument("target", metavar="OUT.jsonl", type=Path, help="where the result goes, whole or not at all")
    marks = parser.add_argument_group("marks", "Each may be given several times.")
    marks.add_argument("--tag", metavar="NAME", action="append", help="what stands between <NAME> and </NAME>")
    marks.add_argument("--field", metavar="NAME", action="append", help='messages with "NAME": true')
    marks.add_argument("--role", metavar="ROLE", action="append", help="messages of that role")
    marks.add_argument("--regex", metavar="PATTERN", action="append", help="what a regular expression matches")
    marks.add_argument(
        "--predicate",
        metavar="FILE.py:F",
        action="append",
        help="messages that F(message) is true of; runs the file",
    )
    marks.add_argument("--no-strip", action="store_true", help="strip nothing, only make variants")
    strip = parser.add_argument_group("stripping")
    strip.add_argument(
        "--tidy", action="store_true", help="where two runs of white space would meet, remove the lesser one too"
    )
    strip.add_argument("--allow-quotes", action="store_true", help="keep samples that quote what was stripped")
    strip.add_argument("--quote-words", metavar="N", type=int, help="words in a row that are a quote (default: 5)")
    strip.add_argument("--allow-unchanged", action="store_true", help="accept a file with nothing to strip in it")
    strip.add_argument("--skip-bad", action="store_true", help="leave out malformed rows, name them, do the rest")
    strip.add_argument(
        "--tokenizer", metavar="ID_OR_DIR", help="count what is removed in this model's tokens (default: in words)"
    )
    variants = parser.add_argument_group("variants", _VARIANTS)
    variants.add_argument("--variants", metavar="N", type=int, default=1, help="contexts per decision (default: 1)")
    variants.add_argument("--seed", type=int, help="draws other variants (default: 0)")
    variants.add_argument("--drop", metavar="P", type=float, help="leave independent messages out with probability P")
    variants.add_argument("--shuffle", action="store_true", help="bring independent messages into random order")
    variants.add_argument("--swaps", metavar="N", type=int, help="let two independent messages change places, N times")
    variants.add_argument(
        "--insert",
        metavar="FILE",
        type=Path,
        help='put in unrelated messages; rows are these, or {"messages": [...]}',
    )
    variants.add_argument("--max-inserts", metavar="N", type=int, help="at most N of them at once (default: 1)")
    variants.add_argument(
        "--paraphrases",
        metavar="FILE",
        type=Path,
        help='reword whole sentences and messages; rows are {"text": ..., "alternatives": [...]}',
    )
    variants.add_argument(
        "--keep-instructions", metavar="P", type=float, help="leave each instruction in with probability P, never all"
    )
    independent = parser.add_argument_group(
        "independent messages",
        'What may be dropped or moved. Without any of these: messages with "independent": true.',
    )
    independent.add_argument("--independent-field", metavar="NAME", action="append", help='messages with "NAME": true')
    independent.add_argument("--independent-role", metavar="ROLE", action="append", help="messages of that role")
    independent.add_argument(
        "--independent-predicate", metavar="FILE.py:F", action="append", help="messages that F(message) is true of"
    )
    independent.add_argument(
        "--independent-exchanges", action="store_true", help="a user's message and the answer to it, as one"
    )
    return parser


def _settings(options: argparse.Namespace) -> StripSettings:
    _require_use(options)
    given = _marks(
        tags=options.tag,
        fields=options.field,
        roles=options.role,
        patterns=options.regex,
        predicates=[load_function(name) for name in options.predicate or ()],
    )
    return StripSettings(
        marks=None if options.no_strip else given or DEFAULT_MARKS,
        tidy=options.tidy,
        allow_quotes=options.allow_quotes,
        quote_words=5 if options.quote_words is None else options.quote_words,
        variants=_variants(options),
        seed=options.seed or 0,
        skip_bad=options.skip_bad,
        allow_unchanged=options.allow_unchanged,
    )


def _variants(options: argparse.Namespace) -> VariantSettings:
    independent = _marks(
        fields=options.independent_field,
        roles=options.independent_role,
        predicates=[load_function(name) for name in options.independent_predicate or ()],
    )
    return VariantSettings(
        num_variants=options.variants,
        drop=options.drop or 0.0,
        shuffle=options.shuffle,
        swaps=options.swaps or 0,
        insert=read_units(options.insert) if options.insert else (),
        max_inserts=1 if options.max_inserts is None else options.max_inserts,
        paraphrases=read_paraphrases(options.paraphrases) if options.paraphrases else None,
        keep_instructions=options.keep_instructions or 0.0,
        independent=independent or DEFAULT_INDEPENDENT,
        independent_exchanges=options.independent_exchanges,
    )


def _marks(**given: Sequence[Any] | None) -> Marks | None:
    """The marks given, None where there are none."""
    return Marks(**{name: tuple(values or ()) for name, values in given.items()}) if any(given.values()) else None


def _require_use(options: argparse.Namespace) -> None:
    """Raises for options that would have no effect beside the others."""
    stripping = ("tag", "field", "role", "regex", "predicate", "tidy", "allow_quotes", "quote_words")
    ways = ("drop", "shuffle", "swaps", "insert", "paraphrases", "keep_instructions")
    independent = [name for name in vars(options) if name.startswith("independent_")]
    moving = any(getattr(options, name) for name in ("drop", "shuffle", "swaps", "insert"))
    for names, useless, remedy in (
        ((*stripping, "allow_unchanged", "tokenizer"), options.no_strip, "it has no use with --no-strip"),
        (("no_strip", *ways, "seed"), options.variants == 1, "it has no use without --variants above 1"),
        (independent, not moving, "it has no use without --drop, --shuffle, --swaps or --insert"),
        (("max_inserts",), not options.insert, "it has no use without --insert"),
    ):
        for name in names:
            value = getattr(options, name)
            if useless and value is not None and value is not False:
                raise ValueError(f"--{name.replace('_', '-')}: {remedy}")


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
    width = max(len(title) for title, _, _ in rows)
    digits = max(len(f"{count:,}") for _, count, _ in rows)
    lines = [f"  {title:<{width}}  {count:>{digits},}  {note}".rstrip() for title, count, note in rows]
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
