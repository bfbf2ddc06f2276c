# SPDX-License-Identifier: Apache-2.0
"""Compares training steps of `FrozenContextTrainer` with `SFTTrainer`'s and with the bare cost.

    python -m tests.benchmarks

Prints a table and writes it, with every figure behind it, to `docs/benchmarks/step.md` and `step.json`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.step import MEBIBYTE

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
METHODS = ("frozen", "bare", "sft")
HEADER = (
    "context", "SFTTrainer s", "frozen s", "bare s", "frozen/SFT", "frozen/bare",
    "SFTTrainer MiB", "frozen MiB", "frozen/SFT", "cache MiB",
)  # fmt: skip


def measure(method: str, context: int, steps: int) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.step"]
    command += ["--method", method, "--context", str(context), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(figures: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """One line of the table from the figures of the three methods at one context length."""
    sft, frozen, bare = figures["sft"], figures["frozen"], figures["bare"]
    return (
        f"{frozen['context']}",
        f"{sft['seconds']:.2f}",
        f"{frozen['seconds']:.2f}",
        f"{bare['seconds']:.2f}",
        f"{frozen['seconds'] / sft['seconds']:.2f}",
        f"{frozen['seconds'] / bare['seconds']:.2f}",
        f"{sft['peak_bytes'] / MEBIBYTE:.0f}",
        f"{frozen['peak_bytes'] / MEBIBYTE:.0f}",
        f"{frozen['peak_bytes'] / sft['peak_bytes']:.2f}",
        f"{frozen['cache_bytes'] / MEBIBYTE:.1f}",
    )


def markdown(rows: list[tuple[str, ...]], machine: dict[str, str]) -> str:
    """The page that is kept with the figures."""
    widths = [max(len(line[column]) for line in [HEADER, *rows]) for column in range(len(HEADER))]
    lines = [HEADER, tuple("-" * (width - 1) + ":" for width in widths), *rows]
    table = "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
    facts = "\n".join(f"- {name}: {text}" for name, text in machine.items())
    return (
        "# One training step\n\n"
        "Made by `make bench`; do not edit.\n\n"
        "One sample per step: a context, and a decision of 64 tokens behind it. `SFTTrainer` and "
        "`FrozenContextTrainer` run with their default settings (gradient checkpointing on, float32), on the same "
        "model (Qwen3.5-style, 6 Gated DeltaNet and 2 attention layers, hidden size 320), the same LoRA adapters and "
        "the same samples. *Bare* is the least a frozen context costs, written by hand in `recipes/minimal.py`: one "
        "forward of the context without gradient, one forward and backward of the decision. Seconds are medians "
        "over the steps after the first. Memory is the peak above the loaded model, of the whole run, the check of "
        "the first batch included. *Cache* is what a frozen context of that length takes.\n\n"
        f"{table}\n\n{facts}\n"
    )


def main() -> None:
    """Measures every context length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="context tokens")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per measurement")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    all_figures, rows = [], []
    for context in arguments.contexts:
        figures = {}
        for method in METHODS:
            print(f"{method} with {context} context tokens ...", file=sys.stderr, flush=True)
            figures[method] = measure(method, context, arguments.steps)
        all_figures += figures.values()
        rows.append(row(figures))
    page = markdown(rows, describe_machine())
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "step.md").write_text(page)
    results = {"machine": describe_machine(), "figures": all_figures}
    (arguments.output / "step.json").write_text(json.dumps(results, indent=2) + "\n")
    print(page)


if __name__ == "__main__":
    main()
