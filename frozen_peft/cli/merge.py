# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft merge`: a checkpoint of a base and its adapters."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_peft.cli.demo import model_source
from frozen_peft.cli.errors import reported

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Merges, and prints what was written.

    Args:
        arguments: Command-line arguments after `merge`.

    Raises:
        CommandError: An argument, adapter or base cannot be used.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.layout is not None:
        _export(parser, options)
        return
    from frozen_peft.merging import merge_adapter

    with reported():
        probes = _read_probes(options.probes)
        report = merge_adapter(
            options.adapter,
            options.output,
            None if options.base is None else model_source(options.base),
            revision=options.revision,
            dtype=options.dtype,
            onto=options.onto,
            weights=options.weights,
            combination=options.combination,
            density=options.density,
            seed=options.seed,
            verify=options.verify,
            samples=_read_samples(options.samples),
            any_base=options.any_base,
            trust_remote_code=options.trust_remote_code,
            allow_pickle=options.allow_pickle,
        )
    if probes:
        with reported(raised_in="frozen_peft"):
            report["probes"] = _score_probes(options, probes)
            _rewrite_report(options.output, report)
    print(_summary(options.output, report))


def _export(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Writes the adapter itself, under the names of the class asked for."""
    used = ("adapter", "output", "layout", "allow_pickle")
    idle = [name for name, value in vars(options).items() if name not in used and value != parser.get_default(name)]
    with reported():
        if idle:
            option = idle[0].replace("_", "-")
            raise ValueError(f"--layout writes the adapter itself, on which --{option} has no effect")
        if len(options.adapter) > 1:
            raise ValueError(f"--layout writes one adapter, got {len(options.adapter)}")
        from frozen_peft.merging import export_adapter

        export_adapter(options.adapter[0], options.output, options.layout, allow_pickle=options.allow_pickle)
    print(_aligned([("adapter", str(options.output)), ("layout", options.layout)]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft merge",
        description="Writes the model that a base and its adapters are together: a checkpoint with the base's files, "
        "which loads as the base does. The base is read tensor by tensor, so memory for one matrix is enough. The "
        "output appears whole or not at all, with a merge_report.json.",
    )
    parser.add_argument("adapter", nargs="+", help="folder or hub id of a PEFT adapter; several are combined")
    parser.add_argument("output", type=Path, help="folder to write, which is not there yet or empty")
    parser.add_argument(
        "--base", metavar="ID_OR_DIR", help="the base model in 16 or 32 bit (default: the one the adapter names)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a base on the hub")
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32", "bfloat16", "float16", "float32"],
        help="type of the weights (default: each keeps its own)",
    )
    parser.add_argument(
        "--onto",
        choices=["original", "quantized"],
        default="original",
        help="of an adapter trained on a 4-bit base: add it to the base's own weights, or to the de-quantized ones "
        "that it saw in training (default: original)",
    )
    parser.add_argument(
        "--layout",
        choices=["text", "wrapper"],
        help="write the adapter itself, unmerged, with the names of the text class or of the vision-language wrapper",
    )
    checked = parser.add_argument_group("verification")
    checked.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the merged model with the unmerged adapter (default: where one model fits in memory)",
    )
    checked.add_argument(
        "--samples", type=Path, metavar="FILE", help="JSON Lines of samples that recovery is measured on; a few do"
    )
    checked.add_argument(
        "--probes", type=Path, nargs="+", default=[], metavar="FILE", help="probe sets to score the merged model on"
    )
    checked.add_argument(
        "--any-base", action="store_true", help="merge onto a base that differs from what training recorded"
    )
    several = parser.add_argument_group("several adapters")
    several.add_argument("--weights", type=float, nargs="+", metavar="W", help="a factor for each (default: 1)")
    several.add_argument(
        "--combination",
        choices=["linear", "ties", "dare_linear", "dare_ties"],
        default="linear",
        help="add the updates, or combine those of each matrix by TIES or DARE as PEFT does (default: linear)",
    )
    several.add_argument("--density", type=float, help="share of each update that TIES and DARE keep, above 0 to 1")
    several.add_argument("--seed", type=int, default=0, help="decides what DARE drops (default: 0)")
    trust = parser.add_argument_group("trust")
    trust.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the base")
    trust.add_argument(
        "--allow-pickle", action="store_true", help="read weights that are pickles (tensors only, no code is run)"
    )
    return parser


def _read_samples(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    from frozen_peft.data import read_rows, sample_problem

    samples = [row.values for row in read_rows(path, sample_problem)]
    if not samples:
        raise ValueError(f"{path} holds no samples")
    return samples


def _read_probes(paths: list[Path]) -> dict[str, Any]:
    """Probe sets by the names of their files, or by their paths where two have one name."""
    from frozen_peft.evaluation import read_probes

    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): read_probes(path) for path in paths}


def _score_probes(options: argparse.Namespace, probes: dict[str, Any]) -> dict[str, Any]:
    """The figures of every probe set, of the merged model as it was written."""
    from transformers import AutoTokenizer

    from frozen_peft.evaluation import score_probes, summarize
    from frozen_peft.merging import load_merged

    model = load_merged(options.output, trust_remote_code=options.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(options.output, trust_remote_code=options.trust_remote_code)
    return {
        name: {
            kind: dataclasses.asdict(summary)
            for kind, summary in summarize(score_probes(model, tokenizer, own)).items()
        }
        for name, own in probes.items()
    }


def _rewrite_report(output: Path, report: dict[str, Any]) -> None:
    from frozen_peft.merging import REPORT
    from frozen_peft.utils.files import whole_file

    with whole_file(output / REPORT) as file:
        file.write(json.dumps(report, indent=2) + "\n")


def _summary(output: Path, report: dict[str, Any]) -> str:
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
    return _aligned(rows)


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


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"  {title:<{width}}  {text}" for title, text in rows)
