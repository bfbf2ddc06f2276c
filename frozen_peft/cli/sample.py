# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft sample`: good behaviour, by asking a model that has its instructions in place.

Samples decisions for prompts, from a local model or from a server with OpenAI's interface, keeps those that pass a
filter, and writes prompt-completion samples to train on.

A row of PROMPTS has a `prompt`, messages or text, with the instructions in place (a row that was stripped has them in
`stripped`, and they are put back for sampling). Its other columns come along to OUT, with the decision in
`completion`, which of the candidates it is in `candidate`, and what it was drawn with in `seed`. With
--without_instructions they stay out: `frozen_peft.data.join_pairs` makes preference pairs of what was said with and
without them.

A candidate of a local model is written such that it trains in the tokens that it was generated in, reasoning, calls of
tools and special tokens included. One whose text the tokenizer has other tokens for is marked, in `retokenized`; one
that would train as another text is left out.

OUT appears when all is done. What is sampled meanwhile is kept in a work file beside it: after an interruption the
same command goes on from there, without asking for anything twice.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frozen_peft.cli.arguments import CommandParser, given_marks, load_chosen_model, load_function
from frozen_peft.cli.errors import CommandError, reported
from frozen_peft.data import DEFAULT_MARKS
from frozen_peft.evaluation import (
    CandidateFilter,
    EndpointSampler,
    FilterError,
    PromptRow,
    RetrySettings,
    Sampler,
    SamplingSettings,
    read_prompts,
    run_sample_job,
    work_file,
)

__all__ = ["run"]


_MIN_MARGIN = """\
what the instructions must add to the decision's log-probability, mean per token (--min_margin=-inf measures only); it
goes into the column `margin`. Instructions are those in `stripped`, or what is marked"""

_MARKS = """\
What the instructions are, for --min_margin, in rows that have no `stripped`. Each may be given several times; without
any, <instruction> tags and messages with "instruction": true. As in frozen-peft strip."""


def run(arguments: Sequence[str]) -> None:
    """Samples, and prints what became of the candidates.

    Args:
        arguments: Command-line arguments after `sample`.

    Raises:
        CommandError: An argument or a row cannot be used, the server does not answer, or the run was interrupted.
    """
    parser = _parser()
    options = parser.read(arguments)
    bad: list[str] = []
    measures = options.min_margin is not None
    with reported():
        settings = SamplingSettings(
            options.num_candidates, options.temperature, options.top_p, options.max_new_tokens, options.seed
        )
        _require_usable(parser, options)
        keep = _filter(options)
        rows = read_prompts(
            options.prompts,
            settings,
            (given_marks(options) or DEFAULT_MARKS) if measures else None,
            unasked=options.without_instructions,
            on_bad=_skip(bad) if options.skip_bad else None,
        )
        sampler, keep = _loaded(options, settings, rows, keep)
    try:
        with reported(raised_in="frozen_peft"):
            summary = run_sample_job(rows, options.out, sampler, keep, _fingerprint(options))
    except KeyboardInterrupt as interrupt:
        raise CommandError(f"interrupted; {_way_on(options)}") from interrupt
    except CommandError as error:
        # Not where the work file itself is what cannot be used.
        if isinstance(error.__cause__, ConnectionError | FilterError):
            raise CommandError(f"{error}; {_way_on(options)}") from error
        raise
    print(f"\n  {options.out}")
    print(summary.table())
    if bad:
        print(f"  {len(bad)} bad rows of {options.prompts} left out, named above")
    if summary.num_candidates and not summary.num_kept:
        raise CommandError(
            f"no candidate was kept, so {options.out} was not written; the candidates stay in "
            f"{work_file(options.out)}, and the same command with another filter judges them anew"
        )


def _parser() -> CommandParser:
    parser = CommandParser("sample", __doc__, joint="_")
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="what to sample for")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="where the samples are written")
    parser.option("overwrite", "replace OUT where it exists", False)
    text = "leave out what is in `stripped`: what the model says unasked, the rejected answers of pairs"
    parser.option("without_instructions", text, False)
    parser.option("skip_bad", "leave bad rows out, and say which", False)
    parser.add_model(
        "the model to sample from; demo: the one that we ship; with --endpoint, the server's name of one",
        "hub id or folder of an adapter to sample with",
    )
    parser.add_cost(16, "candidates decoded together; lower it where memory is short")
    retries = RetrySettings()
    parser.section("endpoint")
    parser.option("endpoint", "sample from this server instead, such as http://localhost:8000/v1", metavar="URL")
    parser.option("api_key_env", "environment variable that holds the key; without it none is sent", metavar="NAME")
    parser.option("concurrency", "requests under way at a time", 4)
    parser.option("timeout", "seconds a request may take", retries.timeout)
    parser.option("max_retries", "times that a request is tried again", retries.max_retries)
    text = "seconds to wait before trying again, at most; a server that wants more ends the run"
    parser.option("max_wait", text, retries.max_wait)
    drawing = SamplingSettings()
    parser.section("candidates")
    parser.option("num_candidates", "for each prompt", drawing.num_candidates)
    parser.option("temperature", "0: the likeliest token", drawing.temperature)
    parser.option("top_p", "draw from the likeliest tokens that come to this", drawing.top_p)
    parser.option("max_new_tokens", "after which a candidate is cut off", drawing.max_new_tokens)
    parser.option("seed", "decides, with the prompt, what each candidate is drawn with", drawing.seed)
    parser.section("filter", "A candidate is kept if it passes all that is given.")
    parser.option("keep_regex", "must match somewhere in the decision (Python's re)", metavar="REGEX")
    text = "must return True, given the sample that prompt and candidate make; the file is run"
    parser.option("keep", text, metavar="FILE.py:FUNCTION")
    parser.option("min_margin", _MIN_MARGIN, metavar="NATS", type=float)
    text = "with --endpoint: the model to measure margins with, locally"
    parser.option("margin_model", text, metavar="ID_OR_DIR")
    parser.option("keep_unfinished", "also keep what was cut off at --max_new_tokens", False)
    parser.add_marks(_MARKS)
    return parser


def _require_usable(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuses options that go against each other or would have no effect."""
    measures = options.min_margin is not None
    if not options.endpoint:
        parser.refuse_idle(options, ("api_key_env", "margin_model"), "without --endpoint")
    if not measures:
        marks = ("tag", "field", "role", "regex", "predicate")
        parser.refuse_idle(options, (*marks, "margin_model"), "without --min_margin")
    if options.endpoint and not measures:
        local = ("adapter", "tokenizer", "load_in_4bit", "trust_remote_code", "allow_pickle")
        parser.refuse_idle(options, local, "with --endpoint, whose server chooses its model")
    if measures and options.without_instructions:
        raise ValueError("--min_margin is what instructions add to a decision, and --without_instructions has none")
    if measures and math.isnan(options.min_margin):
        raise ValueError("--min_margin must be a number, got nan")
    if measures and options.endpoint and options.margin_model is None:
        raise ValueError("--min_margin needs --margin_model beside --endpoint: a server does not give what it takes")
    if options.prompts.absolute() == options.out.absolute():
        raise ValueError(f"OUT is PROMPTS, {options.out}; write elsewhere")
    if options.out.exists() and not options.overwrite and not work_file(options.out).exists():
        raise ValueError(f"{options.out} exists; --overwrite replaces it")


def _filter(options: argparse.Namespace) -> CandidateFilter:
    pattern = None
    if options.keep_regex is not None:
        try:
            pattern = re.compile(options.keep_regex)
        except re.error as error:
            raise ValueError(f"--keep_regex {options.keep_regex!r}: not a regular expression: {error}") from error
    return CandidateFilter(
        pattern=pattern,
        function=load_function(options.keep) if options.keep else None,
        function_name=options.keep or "",
        keep_unfinished=options.keep_unfinished,
    )


def _loaded(
    options: argparse.Namespace, settings: SamplingSettings, rows: Sequence[PromptRow], keep: CandidateFilter
) -> tuple[Sampler, CandidateFilter]:
    """Sampler and filter with the model that they need, loaded once for both."""
    # At first use: torch takes seconds to import.
    from frozen_peft.evaluation import DecisionMargin, LocalSampler

    # Before a model is loaded, since this is where an option can still be wrong.
    server = _endpoint_sampler(options, settings) if options.endpoint else None
    name = options.margin_model if options.endpoint else options.model
    if name is None:
        assert server is not None
        return server, keep
    model, tokenizer = load_chosen_model(options, name)
    sizes = {"batch_size": options.batch_size, "chunk_size": options.prefill_chunk_size}
    if options.min_margin is not None:
        margin = DecisionMargin(model, tokenizer, **sizes)
        keep = dataclasses.replace(keep, margin=margin, min_margin=options.min_margin)
    if server is not None:
        return server, keep
    sampler = LocalSampler(model, tokenizer, settings, **sizes)
    sampler.check(rows)
    return sampler, keep


def _endpoint_sampler(options: argparse.Namespace, settings: SamplingSettings) -> EndpointSampler:
    return EndpointSampler(
        options.endpoint,
        options.model,
        settings,
        retries=RetrySettings(options.timeout, options.max_retries, options.max_wait),
        concurrency=options.concurrency,
        api_key=_api_key(options.api_key_env),
        on_wait=lambda message: tqdm.write(f"frozen-peft sample: {message}", file=sys.stderr),
    )


def _api_key(name: str | None) -> str | None:
    if name is None:
        return None
    if not os.environ.get(name):
        raise ValueError(f"--api_key_env: there is no environment variable {name}, or it is empty")
    return os.environ[name]


def _fingerprint(options: argparse.Namespace) -> dict[str, Any]:
    """All that candidates and margins depend on.

    The filter is judged anew in each run, and where and how patiently a server is asked makes no difference.
    """
    names = ["model", "num_candidates", "temperature", "top_p", "max_new_tokens", "seed", "skip_bad"]
    if options.without_instructions:
        names.append("without_instructions")
    if options.min_margin is not None:
        names += ["margin_model", "tag", "field", "role", "regex", "predicate"]
    if not options.endpoint or options.margin_model:
        names += ["adapter", "tokenizer", "revision", "dtype", "load_in_4bit"]
    settings = {name: getattr(options, name) for name in names}
    settings["endpoint"] = bool(options.endpoint)
    settings["margin"] = options.min_margin is not None
    settings["prompts"] = _digest(options.prompts)
    for function in options.predicate or []:
        settings[function] = _digest(Path(function.rpartition(":")[0]))
    return settings


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _skip(bad: list[str]) -> Any:
    def on_bad(message: str) -> None:
        bad.append(message)
        tqdm.write(f"frozen-peft sample: left out: {message}", file=sys.stderr)

    return on_bad


def _way_on(options: argparse.Namespace) -> str:
    return f"what is done is in {work_file(options.out)}, and the same command goes on from there"
