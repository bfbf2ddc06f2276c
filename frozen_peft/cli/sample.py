# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft sample`: good behaviour, by asking a model that has its instructions in place."""

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

from frozen_peft.cli.demo import model_source
from frozen_peft.cli.errors import CommandError, reported
from frozen_peft.cli.functions import load_function
from frozen_peft.cli.sample_options import make_parser, underscored
from frozen_peft.data import DEFAULT_MARKS, Marks
from frozen_peft.evaluation import (
    CandidateFilter,
    DecisionMargin,
    EndpointSampler,
    FilterError,
    LocalSampler,
    PromptRow,
    RetrySettings,
    Sampler,
    SamplingSettings,
    load_model,
    read_prompts,
    run_sample_job,
    work_file,
)

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Samples, and prints what became of the candidates.

    Args:
        arguments: Command-line arguments after `sample`.

    Raises:
        CommandError: An argument or a row cannot be used, the server does not answer, or the run was interrupted.
    """
    options = make_parser().parse_args([underscored(argument) for argument in arguments])
    bad: list[str] = []
    with reported():
        settings = SamplingSettings(
            options.num_candidates, options.temperature, options.top_p, options.max_new_tokens, options.seed
        )
        _require_usable(options)
        keep = _filter(options)
        rows = read_prompts(
            options.prompts,
            settings,
            _marks(options),
            with_stripped=options.min_margin is not None,
            on_bad=_skip(bad) if options.skip_bad else None,
        )
    with reported():
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


def _require_usable(options: argparse.Namespace) -> None:
    """Refuses options that go against each other or would have no effect."""
    marks = ("tag", "field", "role", "regex", "predicate")
    local = ("adapter", "tokenizer", "load_in_4bit", "trust_remote_code", "allow_pickle")
    margin = options.min_margin is not None
    for names, useless, reason in (
        (("api_key_env", "margin_model"), not options.endpoint, "without --endpoint"),
        ((*marks, "margin_model"), not margin, "without --min_margin"),
        (local, options.endpoint and not margin, "with --endpoint, whose server chooses its model"),
    ):
        given = [name for name in names if useless and getattr(options, name) not in (None, False)]
        if given:
            raise ValueError(f"--{given[0]} has no effect {reason}")
    if margin and math.isnan(options.min_margin):
        raise ValueError("--min_margin must be a number, got nan")
    if margin and options.endpoint and options.margin_model is None:
        raise ValueError("--min_margin needs --margin_model beside --endpoint: a server does not give what it takes")
    if options.prompts.absolute() == options.out.absolute():
        raise ValueError(f"OUT is PROMPTS, {options.out}; write elsewhere")
    if options.out.exists() and not options.overwrite and not work_file(options.out).exists():
        raise ValueError(f"{options.out} exists; --overwrite replaces it")


def _marks(options: argparse.Namespace) -> Marks | None:
    """What the instructions are, where a margin is to be measured."""
    if options.min_margin is None:
        return None
    given = {
        "tags": options.tag,
        "fields": options.field,
        "roles": options.role,
        "patterns": options.regex,
        "predicates": [load_function(name) for name in options.predicate or ()],
    }
    if not any(given.values()):
        return DEFAULT_MARKS
    return Marks(**{name: tuple(values or ()) for name, values in given.items()})


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
    # Before a model is loaded, since this is where an option can still be wrong.
    server = _endpoint_sampler(options, settings) if options.endpoint else None
    name = options.margin_model if options.endpoint else options.model
    if name is None:
        assert server is not None
        return server, keep
    model, tokenizer = load_model(
        model_source(name),
        adapter=options.adapter,
        tokenizer=options.tokenizer,
        revision=options.revision,
        dtype=options.dtype,
        load_in_4bit=options.load_in_4bit,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
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
    try:
        return EndpointSampler(
            options.endpoint,
            options.model,
            settings,
            retries=RetrySettings(options.timeout, options.max_retries, options.max_wait),
            concurrency=options.concurrency,
            api_key=_api_key(options.api_key_env),
            on_wait=lambda message: tqdm.write(f"frozen-peft sample: {message}", file=sys.stderr),
        )
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error


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
