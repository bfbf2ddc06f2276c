# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft sample`: good behaviour, by asking a model that has its instructions in place."""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frozen_peft.behavior import (
    CandidateFilter,
    EndpointSampler,
    LocalSampler,
    PromptRow,
    RetrySettings,
    Sampler,
    SamplingSettings,
    load_sampling_model,
    read_prompts,
    run_sample_job,
    work_file,
)
from frozen_peft.cli.errors import CommandError, reported
from frozen_peft.cli.functions import load_function

__all__ = ["run"]

DESCRIPTION = """\
Samples decisions for prompts, from a local model or from a server with OpenAI's interface, keeps those that pass a
filter, and writes prompt-completion samples to train on.

A row of PROMPTS has a `prompt`, messages or text, with the instructions in place (a row that was stripped has them in
`stripped`, and they are put back for sampling). Its other columns come along to OUT, with the decision in
`completion`, which of the candidates it is in `candidate`, and what it was drawn with in `seed`.

OUT appears when all is done. What is sampled meanwhile is kept in a work file beside it: after an interruption the
same command goes on from there, without asking for anything twice.
"""


def run(arguments: Sequence[str]) -> None:
    """Samples, and prints what became of the candidates.

    Args:
        arguments: Command-line arguments after `sample`.

    Raises:
        CommandError: An argument or a row cannot be used, the server does not answer, or the run was interrupted.
    """
    options = _parser().parse_args([_underscored(argument) for argument in arguments])
    bad: list[str] = []
    with reported():
        settings = SamplingSettings(
            options.num_candidates, options.temperature, options.top_p, options.max_new_tokens, options.seed
        )
        _require_usable(options)
        keep = _filter(options)
        rows = read_prompts(options.prompts, settings, on_bad=_skip(bad) if options.skip_bad else None)
    with reported():
        sampler = _sampler(options, settings, rows)
    try:
        with reported(raised_in="frozen_peft"):
            summary = run_sample_job(rows, options.out, sampler, keep, _fingerprint(options))
    except KeyboardInterrupt as interrupt:
        raise CommandError(f"interrupted; {_way_on(options)}") from interrupt
    except CommandError as error:
        if work_file(options.out).exists() and isinstance(error.__cause__, ConnectionError):
            raise CommandError(f"{error}; {_way_on(options)}") from error
        raise
    print(f"\n  {options.out}")
    print(summary.table())
    if bad:
        print(f"  {len(bad)} bad rows of {options.prompts} left out, named above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft sample",
        description=DESCRIPTION,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="what to sample for")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="where the samples are written")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--skip_bad", action="store_true", help="leave bad rows out, and say which")
    _add_model(parser.add_argument_group("model"))
    _add_endpoint(parser.add_argument_group("endpoint"))
    drawing = parser.add_argument_group("candidates")
    defaults = SamplingSettings()
    drawing.add_argument("--num_candidates", type=int, default=defaults.num_candidates, help="for each prompt")
    drawing.add_argument("--temperature", type=float, default=defaults.temperature, help="0: the likeliest token")
    drawing.add_argument(
        "--top_p", type=float, default=defaults.top_p, help="draw from the likeliest tokens that come to this"
    )
    drawing.add_argument(
        "--max_new_tokens", type=int, default=defaults.max_new_tokens, help="after which a candidate is cut off"
    )
    drawing.add_argument(
        "--seed", type=int, default=defaults.seed, help="decides, with the prompt, what each candidate is drawn with"
    )
    _add_filters(parser.add_argument_group("filter", "A candidate is kept if it passes all that is given."))
    return parser


def _underscored(argument: str) -> str:
    """An option with hyphens in its name, such as `--skip-bad`, as the one with underscores."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _add_model(group: Any) -> None:
    group.add_argument(
        "--model", required=True, help="hub id or folder of a model; with --endpoint, the server's name of one"
    )
    group.add_argument("--adapter", help="hub id or folder of an adapter to sample with")
    group.add_argument("--revision", default="main", help="branch, tag or commit of a model on the hub")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="type of the loaded weights; auto: the checkpoint's own",
    )
    group.add_argument("--load_in_4bit", action="store_true", help="quantize the base to 4 bit")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    group.add_argument(
        "--batch_size", type=int, default=16, help="candidates decoded together; lower it where memory is short"
    )
    group.add_argument(
        "--prefill_chunk_size", type=int, default=2048, help="context tokens per prefill forward; 0: one forward"
    )


def _add_endpoint(group: Any) -> None:
    defaults = RetrySettings()
    group.add_argument(
        "--endpoint", metavar="URL", help="sample from this server instead, such as http://localhost:8000/v1"
    )
    group.add_argument(
        "--api_key_env", metavar="NAME", help="environment variable that holds the key; without it none is sent"
    )
    group.add_argument("--concurrency", type=int, default=4, help="requests under way at a time")
    group.add_argument("--timeout", type=float, default=defaults.timeout, help="seconds a request may take")
    group.add_argument(
        "--max_retries", type=int, default=defaults.max_retries, help="times that a request is tried again"
    )
    group.add_argument(
        "--max_wait",
        type=float,
        default=defaults.max_wait,
        help="seconds to wait before trying again, at most; a server that wants more ends the run",
    )


def _add_filters(group: Any) -> None:
    group.add_argument("--keep_regex", metavar="REGEX", help="must match somewhere in the decision (Python's re)")
    group.add_argument(
        "--keep",
        metavar="FILE.py:FUNCTION",
        help="must return True, given the sample that prompt and candidate make; the file is run",
    )
    group.add_argument("--keep_unfinished", action="store_true", help="also keep what was cut off at --max_new_tokens")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's paragraphs, and names defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def _require_usable(options: argparse.Namespace) -> None:
    """Refuses options that go against each other or would have no effect."""
    local = {
        "--adapter": options.adapter is not None,
        "--load_in_4bit": options.load_in_4bit,
        "--trust_remote_code": options.trust_remote_code,
    }
    if options.endpoint:
        for name in (name for name, given in local.items() if given):
            raise ValueError(f"{name} has no effect with --endpoint, whose server chooses its model")
    elif options.api_key_env:
        raise ValueError("--api_key_env has no effect without --endpoint")
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


def _sampler(options: argparse.Namespace, settings: SamplingSettings, rows: Sequence[PromptRow]) -> Sampler:
    if options.endpoint:
        return _endpoint_sampler(options, settings)
    model, tokenizer = load_sampling_model(
        options.model,
        adapter=options.adapter,
        revision=options.revision,
        dtype=options.dtype,
        load_in_4bit=options.load_in_4bit,
        trust_remote_code=options.trust_remote_code,
    )
    sampler = LocalSampler(
        model, tokenizer, settings, batch_size=options.batch_size, chunk_size=options.prefill_chunk_size
    )
    sampler.check(rows)
    return sampler


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
    """All that candidates depend on; where and how patiently a server is asked does not belong to it."""
    names = ["model", "num_candidates", "temperature", "top_p", "max_new_tokens", "seed"]
    names += ["keep_regex", "keep", "keep_unfinished", "skip_bad"]
    if not options.endpoint:
        names += ["adapter", "revision", "dtype", "load_in_4bit"]
    settings = {name: getattr(options, name) for name in names}
    settings["endpoint"] = bool(options.endpoint)
    settings["prompts"] = _digest(options.prompts)
    if options.keep:
        settings["keep_file"] = _digest(Path(options.keep.rpartition(":")[0]))
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
