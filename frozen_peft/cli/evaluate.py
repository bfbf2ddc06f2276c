# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft evaluate`: what a model makes of probes, before and after training."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from frozen_peft.cli.demo import model_source
from frozen_peft.cli.dtypes import LOADED_DTYPES, full_name
from frozen_peft.cli.errors import reported
from frozen_peft.evaluation import CONDITIONS, read_probes
from frozen_peft.utils.files import whole_file

__all__ = ["run"]

_DESCRIPTION = """\
Measures a disposition with probes: which of two decisions is the more likely one in a context, before training (the
base) and after it (the base with an adapter).

A row of PROBES has a `prompt`, messages or text, and the decisions `preferred` and `rejected`. It may have a `kind`
(target: what training is to bring about, the default; control: what it must not change), the decision that greedy
decoding is `expected` to give, the instructions that were `stripped` from the prompt, and an `id`.

Each probe is scored in several contexts:

  given       its prompt
  instructed  the prompt with the `stripped` instructions back in it; for the base that is the ceiling
  shuffled    another probe's prompt: what is left of the preference does not come from the context
  empty       no context

Reported are the share of probes whose preferred decision is the more likely one (with Wilson's interval), the mean
margin between the two log-probabilities (sums over tokens, with a bootstrap interval), exact matches of greedy
decoding, and on control probes the KL divergence from the base."""


def run(arguments: Sequence[str]) -> None:
    """Scores probes, prints the figures, and writes the report.

    Args:
        arguments: Command-line arguments after `evaluate`.

    Raises:
        CommandError: An argument, probe, model or adapter cannot be used; nothing was written.
    """
    options = _parser().parse_args(arguments)
    bad: list[str] = []
    on_bad = bad.append if options.skip_bad else None
    with reported():
        _require_writable(options.output)
        probes = read_probes(options.probes, on_bad)
    # After what is wrong with the probes is said: torch and transformers take seconds.
    from frozen_peft.evaluation import compare_probes, load_model, probe_report, probe_table

    with reported():
        model, tokenizer = load_model(
            model_source(options.model),
            options.adapter,
            tokenizer=options.tokenizer,
            revision=options.revision,
            dtype=options.dtype,
            load_in_4bit=options.load_in_4bit,
            trust_remote_code=options.trust_remote_code,
            allow_pickle=options.allow_pickle,
        )
    with reported(raised_in="frozen_peft"):
        results = compare_probes(
            model,
            tokenizer,
            probes,
            options.conditions,
            seed=options.seed,
            batch_size=options.batch_size,
            prefill_chunk_size=options.prefill_chunk_size,
            on_bad=on_bad,
        )
        for problem in bad:
            tqdm.write(f"left out: {problem}")
        if options.output is not None:
            origin = {"base": options.model, "adapter": options.adapter, "file": str(options.probes), "left_out": bad}
            report = probe_report(results, seed=options.seed, **origin)
            with whole_file(options.output) as file:
                json.dump(report, file, indent=1, ensure_ascii=False, allow_nan=False)
                file.write("\n")
    print(probe_table(results, seed=options.seed))
    if bad:
        print(f"{len(bad)} bad probes of {options.probes} left out, named above.")
    if options.output is not None:
        print(f"Written to {options.output}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft evaluate",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--probes", type=Path, required=True, metavar="PROBES.jsonl", help="what to score, one a line")
    parser.add_argument(
        "--output", type=Path, metavar="REPORT.json", help="figures and scores of every probe, whole or not at all"
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=CONDITIONS,
        default=CONDITIONS,
        metavar="NAME",
        help="contexts to score probes in (default: all four)",
    )
    parser.add_argument("--skip_bad", "--skip-bad", action="store_true", help="leave bad probes out, and say which")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides whose context is whose, and the resamples (default: 0)"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_DIR",
        help="the base model, or a merged one; demo: the one that we ship",
    )
    model.add_argument(
        "--adapter", metavar="ID_OR_DIR", help="the trained adapter; without one, the model alone is measured"
    )
    model.add_argument(
        "--tokenizer",
        metavar="ID_OR_DIR",
        help="tokenizer and chat template (default: the adapter's where its folder has them, else the model's)",
    )
    model.add_argument("--revision", default="main", help="branch, tag or commit of a model on the hub")
    model.add_argument(
        "--dtype",
        default="auto",
        type=full_name,
        choices=LOADED_DTYPES,
        help="type of the loaded weights (default: the checkpoint's own)",
    )
    model.add_argument("--load_in_4bit", "--load-in-4bit", action="store_true", help="quantize the base to 4 bit")
    model.add_argument(
        "--trust_remote_code", "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    model.add_argument(
        "--allow_pickle",
        "--allow-pickle",
        action="store_true",
        help="read weights that are pickles (tensors only, no code is run)",
    )
    cost = parser.add_argument_group("cost", "These change nothing but time and memory.")
    cost.add_argument(
        "--batch_size", "--batch-size", type=int, default=8, metavar="N", help="decisions per forward (default: 8)"
    )
    cost.add_argument(
        "--prefill_chunk_size",
        "--prefill-chunk-size",
        type=int,
        default=2048,
        metavar="N",
        help="context tokens per forward; 0: all in one (default: 2048)",
    )
    return parser


def _require_writable(output: Path | None) -> None:
    """Refuses an output that could not be written once all is scored."""
    if output is None:
        return
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.absolute().parent}")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file")
