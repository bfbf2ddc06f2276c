# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft merge`: a checkpoint of a base and its adapters.

Writes the model that a base and its adapters are together: a checkpoint with the base's files, which loads as the base
does. The base is read tensor by tensor, so memory for one matrix is enough. The output appears whole or not at all,
with a merge_report.json.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_peft.cli.arguments import CommandParser
from frozen_peft.cli.errors import reported
from frozen_peft.demo import model_source
from frozen_peft.utils.files import whole_file
from frozen_peft.utils.tables import aligned

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Merges, and prints what was written.

    Args:
        arguments: Command-line arguments after `merge`.

    Raises:
        CommandError: An argument, adapter or base cannot be used.
    """
    parser = _parser()
    options = parser.read(arguments)
    if options.layout is None:
        rows = _merge(options)
    else:
        with reported():
            rows = _export(parser, options)
    print("\n".join(aligned(rows)))


def _parser() -> CommandParser:
    parser = CommandParser("merge", __doc__)
    parser.add_argument("adapter", nargs="+", help="folder or hub id of a PEFT adapter; several are combined")
    parser.add_argument("output", type=Path, help="folder to write, which is not there yet or empty")
    text = "the base model in 16 or 32 bit (default: the one the adapter names)"
    parser.option("base", text, metavar="ID_OR_DIR")
    parser.option("revision", "branch, tag or commit of a base on the hub")
    parser.option(
        "dtype",
        "type of the weights (default: each keeps its own)",
        choices=["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"],
    )
    parser.option(
        "onto",
        "of an adapter trained on a 4-bit base: add it to the base's own weights, or to the de-quantized ones that it "
        "saw in training",
        "original",
        choices=["original", "quantized"],
    )
    text = "write the adapter itself, unmerged, with the names of the text class or of the vision-language wrapper"
    parser.option("layout", text, choices=["text", "wrapper"])
    parser.section("verification")
    text = "compare the merged model with the unmerged adapter (default: where one model fits in memory)"
    parser.option("verify", text, action=argparse.BooleanOptionalAction)
    text = "JSON Lines of samples that recovery is measured on; a few do"
    parser.option("samples", text, metavar="FILE", type=Path)
    parser.option("probes", "probe sets to score the merged model on", metavar="FILE", type=Path, nargs="+")
    parser.option("any_base", "merge onto a base that differs from what training recorded", False)
    parser.section("several adapters")
    parser.option("weights", "a factor for each (default: 1)", metavar="W", type=float, nargs="+")
    parser.option(
        "combination",
        "add the updates, or combine those of each matrix by TIES or DARE as PEFT does",
        "linear",
        choices=["linear", "ties", "dare_linear", "dare_ties"],
    )
    parser.option("density", "share of each update that TIES and DARE keep, above 0 to 1", type=float)
    parser.option("seed", "decides what DARE drops", 0)
    parser.section("trust")
    parser.option("trust_remote_code", "run code that comes with the base", False)
    parser.option("allow_pickle", "read weights that are pickles (tensors only, no code is run)", False)
    return parser


def _export(parser: CommandParser, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Writes the adapter itself, under the names of the class asked for."""
    idle = [name for name in vars(options) if name not in ("adapter", "output", "layout", "allow_pickle")]
    parser.refuse_idle(options, idle, "with --layout, which writes the adapter itself")
    if len(options.adapter) > 1:
        raise ValueError(f"--layout writes one adapter, got {len(options.adapter)}")
    from frozen_peft.merging import export_adapter

    export_adapter(options.adapter[0], options.output, options.layout, allow_pickle=options.allow_pickle)
    return [("adapter", str(options.output)), ("layout", options.layout)]


def _merge(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Merges, and scores probes on what was written."""
    from frozen_peft.merging import merge_adapter

    with reported():
        probes = _read_probes(options.probes or [])
        # Options are called as what they are to `merge_adapter`.
        settings = {name: value for name, value in vars(options).items() if name not in ("layout", "probes")}
        settings["base"] = None if options.base is None else model_source(options.base)
        settings["samples"] = _read_samples(options.samples)
        report = merge_adapter(**settings)
    if probes:
        report["probes"] = _add_probes(options, probes, report)
    return _summary(options.output, report)


def _read_samples(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    from frozen_peft.data import Row, read_rows, require_sample

    def sample(row: Row) -> dict[str, Any]:
        require_sample(row.values)
        return row.values

    return list(read_rows(path, sample, empty="the file has no samples"))


def _read_probes(paths: list[Path]) -> dict[str, Any]:
    """Probe sets by the names of their files, or by their paths where two have one name."""
    from frozen_peft.evaluation import read_probes

    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): read_probes(path) for path in paths}


def _add_probes(options: argparse.Namespace, probes: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The figures of every probe set, of the merged model as it was written, which its report gets too."""
    from transformers import AutoTokenizer

    from frozen_peft.evaluation import score_probes, summarize
    from frozen_peft.merging import REPORT, load_merged

    model = load_merged(options.output, trust_remote_code=options.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(options.output, trust_remote_code=options.trust_remote_code)
    figures = {}
    for name, own in probes.items():
        summaries = summarize(score_probes(model, tokenizer, own))
        figures[name] = {kind: dataclasses.asdict(summary) for kind, summary in summaries.items()}
    with whole_file(options.output / REPORT) as file:
        file.write(json.dumps(report | {"probes": figures}, indent=2) + "\n")
    return figures


def _summary(output: Path, report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("merged model", str(output)),
        ("base", report["base"]),
        ("weights", f"{report['tensors']:,} tensors, {report['bytes'] / 1e9:.2f} GB"),
        ("changed", f"{report['merged_parameters']:,} parameters"),
    ]
    if report["untied_embeddings"]:
        rows.append(("embeddings", "no longer tied to the head: the adapter changes one of the two"))
    rows += _verification_rows(report["verification"])
    for name, kinds in report.get("probes", {}).items():
        for kind, figures in kinds.items():
            share, margin = figures["preference"], figures["margin"]["mean"]
            text = f"{share['num']} of {share['total']} preferred, margin {margin:+.2f} nats"
            if figures["exact_match"] is not None:
                text += f", {figures['exact_match']['num']} of {figures['exact_match']['total']} exact"
            rows.append((f"{name}, {kind}", text))
    return rows


def _verification_rows(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return [("verified", "no")]
    rows = []
    if "log_probability_difference" in found:
        mean, effect = found["log_probability_difference"]["mean"], found["adapter_effect"]["mean"]
        text = f"log-probabilities differ by {mean:.2g} nats; the adapter changes them by {effect:.2g}"
        rows.append(("verified", text))
        rows.append(("decisions", f"{found['equal_greedy_decisions']} of {found['prompts']} equal, greedy"))
    if "loss" in found:
        loss, recovery = found["loss"], found["recovery"]
        rows.append(("loss", f"{loss['base']:.4f} base, {loss['adapter']:.4f} adapter, {loss['merged']:.4f} merged"))
        text = "none: the adapter is no better than the base on these samples"
        rows.append(("recovery", text if recovery is None else f"{recovery:.4f}"))
    return rows or [("verified", "no: there is no unmerged model of this combination to compare with")]
