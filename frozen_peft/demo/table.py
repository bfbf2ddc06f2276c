# SPDX-License-Identifier: Apache-2.0
"""What the demo found, as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["percent", "render_table"]

TIERS = {1: "full gradient, short contexts", 2: "frozen contexts", 3: "full gradient, recomputation"}


def percent(share: float) -> str:
    """A share as a whole number of percent, or with one decimal where that says more."""
    return f"{share:.0%}" if round(share * 100, 6) == round(share * 100) else f"{share:.1%}"


def render_table(results: Mapping[str, Any], output: Path) -> str:
    """The figures of `demo.json`, aligned, and where everything is."""
    with_instruction = (results["acceptance_with_instructions"], results["control_with_instructions"])
    rows = [
        ("base, with the instruction", *map(percent, with_instruction), ""),
        ("base, without it", *map(percent, (results["acceptance_before"], results["control_before"])), ""),
    ]
    for name, tier in results["tiers"].items():
        number = int(name.rpartition("_")[2])
        shares = map(percent, (tier["acceptance_after"], tier["control_after"]))
        rows.append((f"tier {number}, {TIERS[number]}", *shares, f"{tier['train_seconds']:.0f}"))
    merged = results["merged"]
    rows.append(("tier 2, merged", *map(percent, (merged["acceptance"], merged["control"])), ""))
    header = ("without the instruction, but for the first line", "accepts directions", "answers questions", "seconds")
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(4)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    probes, settings = results["probes"], results["settings"]
    facts = (
        f"{results['weights']:,} weights; {settings['steps']} steps a tier; probes about held-out names and things: "
        f"{probes['target']} directions, {probes['control']} questions",
        f"greedy decisions, compared word for word; seconds are those of the steps; {results['seconds']:.0f} s in all",
        f"everything is in {output.resolve()}, the figures in demo.json",
    )
    return "\n".join(["", *(f"  {line}" for line in lines), "", *(f"  {fact}" for fact in facts)])
