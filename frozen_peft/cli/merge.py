# SPDX-License-Identifier: Apache-2.0
"""`frozen-peft merge`: a checkpoint of a base and its adapters."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frozen_peft.cli.errors import reported

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Merges, and prints what was written.

    Args:
        arguments: Command-line arguments after `merge`.

    Raises:
        CommandError: An argument, adapter or base cannot be used.
    """
    options = _parser().parse_args(arguments)
    from frozen_peft.adapters import merge_adapter

    with reported():
        report = merge_adapter(
            options.adapter,
            options.output,
            options.base,
            revision=options.revision,
            dtype=options.dtype,
            weights=options.weights,
            combination=options.combination,
            density=options.density,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            allow_pickle=options.allow_pickle,
        )
    print(_summary(options.output, report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="frozen-peft merge",
        description="Writes the model that a base and its adapters are together: a checkpoint with the base's files, "
        "which loads as the base does. The base is read tensor by tensor, so memory for one matrix is enough. The "
        "output appears whole or not at all.",
    )
    parser.add_argument("adapter", nargs="+", help="folder or hub id of a PEFT adapter; several are combined")
    parser.add_argument("output", type=Path, help="folder to write, which is not there yet or empty")
    parser.add_argument(
        "--base", metavar="ID_OR_DIR", help="the 16- or 32-bit base model (default: the one the adapter names)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a base on the hub")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="type of the weights (default: each keeps its own)"
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


def _summary(output: Path, report: dict[str, Any]) -> str:
    rows = [
        ("merged model", str(output)),
        ("base", report["base"]),
        ("weights", f"{report['tensors']:,} tensors, {report['bytes'] / 1e9:.2f} GB"),
        ("changed", f"{report['merged_parameters']:,} parameters"),
    ]
    if report["untied_embeddings"]:
        rows.append(("embeddings", "no longer tied to the head: the adapter changes one of the two"))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"  {title:<{width}}  {text}" for title, text in rows)
