# SPDX-License-Identifier: Apache-2.0
"""Compares the full gradient in stretches with `SFTTrainer`'s, in time, in memory and in the longest sample that fits.

    python -m tests.benchmarks.full_gradient

Prints a table and writes it, with every figure behind it, to `docs/benchmarks/stretches.md` and `stretches.json`. The
figures are written after each measurement: interrupted, it goes on where it was; `--anew` measures all of them again.
"""

import argparse
import json
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.training import MEBIBYTE

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
# Memory above the loaded model in which the longest sample is looked for.
MORE_BYTES = 128 * MEBIBYTE
# A small model, for lengths whose attention would take hours on two cores. Keys and values of a token are a tenth of
# its hidden states of all layers, as in Qwen3.5-27B; what both methods keep of a token is proportional to the layers.
TABLED: dict[str, Any] = {"layers": 8, "heads": 1, "head_dim": 24}
FITTING: dict[str, Any] = {**TABLED, "steps": 1, "stretch": 512, "more_bytes": MORE_BYTES}
# Longer samples are measured in one step, which is the first and so pays for what is done once.
LONGEST_OF_TWO_STEPS = 8192
# Of the longest sample that fits with `SFTTrainer`, what is tried in stretches.
TIMES_AS_LONG = (8, 10, 12, 14, 16)
HEADER = ("tokens", "SFTTrainer s", "stretches s", "ratio", "SFTTrainer MiB", "stretches MiB", "ratio", "cache MiB")


def measure(
    method: str,
    tokens: int,
    *,
    steps: int,
    stretch: int = 1024,
    head_dim: int = 48,
    layers: int = 32,
    heads: int = 4,
    more_bytes: int | None = None,
) -> dict[str, Any] | None:
    """Runs one measurement in a process of its own; None where it ran out of the memory it was given."""
    command = [sys.executable, "-m", "tests.benchmarks.stretches", "--method", method, "--tokens", str(tokens)]
    command += ["--steps", str(steps), "--stretch", str(stretch), "--head-dim", str(head_dim)]
    command += ["--layers", str(layers), "--heads", str(heads), "--checkpointing"]
    if more_bytes is not None:
        command += ["--more-bytes", str(more_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if more_bytes is not None and ("MemoryError" in done.stderr or "allocate memory" in done.stderr):
        return None
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


def longest(method: str, lengths: list[int]) -> int:
    """The last of these lengths, in ascending order, that fits into `MORE_BYTES`; 0 if none does."""
    best = 0
    for tokens in lengths:
        if measure(method, tokens, **FITTING) is None:
            break
        best = tokens
    return best


def row(tokens: int, sft: dict[str, Any] | None, stretches: dict[str, Any] | None) -> tuple[str, ...]:
    """One line of the table; what was not measured is left empty."""
    cells = [f"{tokens}"]
    for name, unit, digits in (("cpu_seconds", 1, 1), ("peak_bytes", MEBIBYTE, 0)):
        values = [None if one is None else one[name] / unit for one in (sft, stretches)]
        cells += ["" if value is None else f"{value:.{digits}f}" for value in values]
        cells.append(f"{values[1] / values[0]:.2f}" if values[0] and values[1] else "")
    known = stretches or sft
    return (*cells, f"{known['cache_bytes'] / MEBIBYTE:.1f}" if known else "")


def _per_token(figures: dict[tuple[str, int], dict[str, Any]]) -> str:
    """What a further token takes with each method, between its two longest samples, and of what that is made up."""
    taken: dict[str, float] = {}
    for method in ("sft", "stretches"):
        found = sorted((one for (name, _), one in figures.items() if name == method), key=itemgetter("tokens"))
        short, long = found[-2:]
        more = long["tokens"] - short["tokens"]
        taken[method] = (long["peak_bytes"] - short["peak_bytes"]) / more
        cache = (long["cache_bytes"] - short["cache_bytes"]) / more
        states = (long["cache_bytes"] - cache * long["tokens"]) / (long["stretch"] or 1)
    sft, stretches = taken["sft"], taken["stretches"]
    rest = stretches - 2 * cache - states
    return (
        f"Between the two longest samples of each, a further token takes {sft / 1024:.1f} KiB with `SFTTrainer` and "
        f"{stretches / 1024:.2f} KiB in stretches: {stretches / cache:.2f} times its {cache:.0f} bytes of keys and "
        f"values. These and their gradient in float32 are {2 * cache:.0f} bytes, the states a stretch starts from "
        f"{states:.0f} for each of its tokens; {rest:.0f} were not attributed (ids, labels, mask and positions of the "
        "sample, and the lists that they are made from, are among them). The larger keys and values are, the nearer "
        "to 2: with the 32 layers of `tests/benchmarks/test_stretches.py`, whose keys and values take 3,072 bytes a "
        "token, a test holds it to 2.5 times."
    )


def markdown(
    figures: dict[tuple[str, int], dict[str, Any]],
    rows: list[tuple[str, ...]],
    fits: dict[str, int],
    machine: dict[str, str],
) -> str:
    """The page that is kept with the figures."""
    widths = [max(len(line[column]) for line in [HEADER, *rows]) for column in range(len(HEADER))]
    lines = [HEADER, tuple("-" * (width - 1) + ":" for width in widths), *rows]
    table = "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
    facts = "\n".join(f"- {name}: {text}" for name, text in machine.items())
    return (
        "# The full gradient in stretches\n\n"
        "Made by `python -m tests.benchmarks.full_gradient`; do not edit.\n\n"
        "One sample per step, 64 of its tokens supervised, float32, the same LoRA adapters of the same model "
        "(Qwen3.5-style, 6 Gated DeltaNet and 2 attention layers, hidden size 128, keys and values of a token "
        "a tenth of its hidden states of all layers, as in Qwen3.5-27B). `SFTTrainer` with gradient checkpointing, "
        "its default, against `tier: 3` with `sequence_chunk_size: 1024` and gradient checkpointing inside a stretch. "
        "Seconds are processor time of a step on one thread, while other work ran on the machine; memory is the peak "
        "above the loaded model. *Cache* is what keys, values and states of that many tokens take. On a CPU TRL's "
        "head computes logits of every token that it is given, which are all with `SFTTrainer` and those of labels in "
        "stretches; on a GPU it computes those of supervised tokens in both.\n\n"
        f"{table}\n\n"
        f"{_per_token(figures)}\n\n"
        f"The longest sample that fits into an address space of {MORE_BYTES // MEBIBYTE} MiB above the loaded model, "
        "with the same model and stretches of 512: "
        f"{fits['sft']} tokens with `SFTTrainer`, {fits['stretches']} in stretches"
        f"{', the longest that was tried' * (fits['stretches'] == TIMES_AS_LONG[-1] * fits['sft'])}.\n\n{facts}\n"
    )


def main() -> None:
    """Measures every length and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="tokens of a sample")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--anew", action="store_true", help="measure what was measured already")
    arguments = parser.parse_args()
    path = arguments.output / "stretches.json"
    results: dict[str, Any] = {"machine": describe_machine(), "figures": [], "more_bytes": MORE_BYTES}
    if path.exists() and not arguments.anew:
        results = json.loads(path.read_text())
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures = {(one["method"], one["tokens"]): one for one in results["figures"]}
    for tokens in arguments.tokens:
        for method in ("sft", "stretches"):
            if (method, tokens) in figures:
                continue
            print(f"{method}, {tokens} tokens ...", file=sys.stderr, flush=True)
            steps = 2 if tokens <= LONGEST_OF_TWO_STEPS else 1
            figures[method, tokens] = measure(method, tokens, steps=steps, **TABLED)
            results["figures"] = list(figures.values())
            path.write_text(json.dumps(results, indent=2) + "\n")
    if "longest" not in results:
        fits = {"sft": longest("sft", [512 * count for count in range(4, 40)])}
        fits["stretches"] = longest("stretches", [fits["sft"] * count for count in TIMES_AS_LONG])
        results["longest"] = fits
        path.write_text(json.dumps(results, indent=2) + "\n")
    rows = [row(tokens, figures.get(("sft", tokens)), figures.get(("stretches", tokens))) for tokens in TOKENS]
    page = markdown(figures, rows, results["longest"], results["machine"])
    (arguments.output / "stretches.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
