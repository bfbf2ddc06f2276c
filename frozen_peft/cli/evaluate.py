# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft evaluate`: what a model makes of probes, before and after training.

Measures a disposition with probes: which of two decisions is the more likely one in a context, before training (the
base) and after it (the base with an adapter).

A row of PROBES has a `prompt`, messages or text, and the decisions `preferred` and `rejected`. It may have a `kind`
(target: what training is to bring about, the default; control: what it must not change), the decision that greedy
decoding is `expected` to give, the instructions that were `stripped` from the prompt, `tools`, and an `id`. Behind
messages a decision may be the assistant's message, with `tool_calls` and `reasoning_content`.

Each probe is scored in several contexts:

  given       its prompt
  instructed  the prompt with the `stripped` instructions back in it; for the base that is the ceiling
  shuffled    another probe's prompt: what is left of the preference does not come from the context
  empty       no context

Reported are the share of probes whose preferred decision is the more likely one (with Wilson's interval), the mean
margin between the two log-probabilities (sums over tokens, with a bootstrap interval), exact matches of greedy
decoding, and on control probes the KL divergence from the base.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from frozen_peft.cli.arguments import CommandParser, load_chosen_model, require_writable
from frozen_peft.cli.errors import reported
from frozen_peft.evaluation import CONDITIONS, read_probes
from frozen_peft.utils.files import whole_file

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Scores probes, prints the figures, and writes the report.

    Args:
        arguments: Command-line arguments after `evaluate`.

    Raises:
        CommandError: An argument, probe, model or adapter cannot be used; nothing was written.
    """
    options = _parser().read(arguments)
    bad: list[str] = []
    on_bad = bad.append if options.skip_bad else None
    with reported():
        require_writable(options.output)
        probes = read_probes(options.probes, on_bad)
        # After what is wrong with the probes is said: torch and transformers take seconds.
        from frozen_peft.evaluation import compare_probes, probe_report, probe_table

        model, tokenizer = load_chosen_model(options, options.model)
    results = compare_probes(
        model,
        tokenizer,
        probes,
        options.conditions,
        seed=options.seed,
        batch_size=options.batch_size,
        prefill_chunk_size=options.prefill_chunk_size,
        context_cache_dir=options.context_cache_dir,
        on_bad=on_bad,
    )
    for problem in bad:
        print(f"left out: {problem}")
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


def _parser() -> CommandParser:
    parser = CommandParser("evaluate", __doc__, joint="_")
    parser.option("probes", "what to score, one a line", metavar="PROBES.jsonl", type=Path, required=True)
    text = "figures and scores of every probe, whole or not at all"
    parser.option("output", text, metavar="REPORT.json", type=Path)
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=CONDITIONS,
        default=CONDITIONS,
        metavar="NAME",
        help="contexts to score probes in (default: all four)",
    )
    parser.option("skip_bad", "leave bad probes out, and say which", False)
    parser.option("seed", "decides whose context is whose, and the resamples", 0)
    parser.add_model(
        "the base model, or a merged one; demo: the one that we ship",
        "the trained adapter; without one, the model alone is measured",
    )
    parser.add_cost(8, "decisions per forward")
    text = "keep contexts as the base encodes them in files here, where the next adapter finds them"
    parser.option("context_cache_dir", text, metavar="DIR", type=Path)
    return parser
