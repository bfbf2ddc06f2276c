# SPDX-License-Identifier: Apache-2.0
"""The arguments of `frozen-peft sample`."""

import argparse
from pathlib import Path
from typing import Any

from frozen_peft.cli.dtypes import LOADED_DTYPES, full_name
from frozen_peft.evaluation import RetrySettings, SamplingSettings

__all__ = ["make_parser", "underscored"]

_DESCRIPTION = """\
Samples decisions for prompts, from a local model or from a server with OpenAI's interface, keeps those that pass a
filter, and writes prompt-completion samples to train on.

A row of PROMPTS has a `prompt`, messages or text, with the instructions in place (a row that was stripped has them in
`stripped`, and they are put back for sampling). Its other columns come along to OUT, with the decision in
`completion`, which of the candidates it is in `candidate`, and what it was drawn with in `seed`.

A candidate of a local model is written such that it trains in the tokens that it was generated in, reasoning, calls of
tools and special tokens included. One whose text the tokenizer has other tokens for is marked, in `retokenized`; one
that would train as another text is left out.

OUT appears when all is done. What is sampled meanwhile is kept in a work file beside it: after an interruption the
same command goes on from there, without asking for anything twice.
"""

_MARKS = """\
What the instructions are, for --min_margin, in rows that have no `stripped`. Each may be given several times; without
any, <instruction> tags and messages with "instruction": true. As in frozen-peft strip."""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of `sample`."""
    parser = argparse.ArgumentParser(
        prog="frozen-peft sample",
        description=_DESCRIPTION,
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
    _add_marks(parser.add_argument_group("marks", _MARKS))
    return parser


def underscored(argument: str) -> str:
    """An option with hyphens in its name, such as `--skip-bad`, as the one with underscores."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _add_model(group: Any) -> None:
    group.add_argument(
        "--model",
        required=True,
        help="hub id or folder of a model, or demo: the one that we ship; with --endpoint, the server's name of one",
    )
    group.add_argument("--adapter", help="hub id or folder of an adapter to sample with")
    group.add_argument(
        "--tokenizer",
        metavar="ID_OR_DIR",
        help="tokenizer and chat template (by default the adapter's where its folder has them, else the model's)",
    )
    group.add_argument("--revision", default="main", help="branch, tag or commit of a model on the hub")
    group.add_argument(
        "--dtype",
        default="auto",
        type=full_name,
        choices=LOADED_DTYPES,
        help="type of the loaded weights; auto: the checkpoint's own",
    )
    group.add_argument("--load_in_4bit", action="store_true", help="quantize the base to 4 bit")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    group.add_argument(
        "--allow_pickle", action="store_true", help="read weights that are pickles (tensors only, no code is run)"
    )
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
    group.add_argument(
        "--min_margin",
        metavar="NATS",
        type=float,
        help="what the instructions must add to the decision's log-probability, mean per token (--min_margin=-inf "
        "measures only); it goes into the column `margin`. Instructions are those in `stripped`, or what is marked",
    )
    group.add_argument(
        "--margin_model", metavar="ID_OR_DIR", help="with --endpoint: the model to measure margins with, locally"
    )
    group.add_argument("--keep_unfinished", action="store_true", help="also keep what was cut off at --max_new_tokens")


def _add_marks(group: Any) -> None:
    group.add_argument("--tag", metavar="NAME", action="append", help="what stands between <NAME> and </NAME>")
    group.add_argument("--field", metavar="NAME", action="append", help='messages with "NAME": true')
    group.add_argument("--role", metavar="ROLE", action="append", help="messages of that role")
    group.add_argument("--regex", metavar="PATTERN", action="append", help="what a regular expression matches")
    group.add_argument(
        "--predicate", metavar="FILE.py:FUNCTION", action="append", help="messages that it is true of; runs the file"
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's paragraphs, and names defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)
