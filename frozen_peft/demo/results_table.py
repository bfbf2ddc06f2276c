# SPDX-License-Identifier: Apache-2.0
"""What the demo found, as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frozen_peft.utils.tables import aligned

__all__ = ["percent", "render_table"]

TIERS = {1: "full gradient, short contexts", 2: "frozen contexts", 3: "full gradient, recomputation"}
HEADER = ("without the instruction, but for the first line", "accepts directions", "answers questions", "seconds")


def percent(share: float) -> str:
    """A share as a whole number of percent, or with one decimal where that says more."""
    return f"{share:.0%}" if round(share * 100, 6) == round(share * 100) else f"{share:.1%}"


def render_table(results: Mapping[str, Any], output: Path) -> str:
    """The figures of `demo.json`, aligned, and where everything is."""
    shares: list[tuple[str, float, float, str]] = [
        (title, results[f"acceptance_{when}"], results[f"control_{when}"], "-")
        for title, when in (("base, with the instruction", "with_instructions"), ("base, without it", "before"))
    ]
    for name, tier in results["tiers"].items():
        number = int(name.rpartition("_")[2])
        seconds = f"{tier['train_seconds']:.0f}"
        shares.append((f"tier {number}, {TIERS[number]}", tier["acceptance_after"], tier["control_after"], seconds))
    shares.append(("tier 2, merged", results["merged"]["acceptance"], results["merged"]["control"], "-"))
    rows = [(title, percent(accepted), percent(right), seconds) for title, accepted, right, seconds in shares]
    heading, *lines = aligned([HEADER, *rows], right=(1, 2, 3))
    probes, settings = results["probes"], results["settings"]
    facts = (
        f"{results['weights']:,} weights; {settings['steps']} steps a tier; probes about held-out names and things: "
        f"{probes['target']} directions, {probes['control']} questions",
        f"greedy decisions, compared word for word; seconds are those of the steps; {results['seconds']:.0f} s in all",
        f"everything is in {output.resolve()}, the figures in demo.json",
    )
    return "\n".join(["", heading, *lines, "", *(f"  {fact}" for fact in facts)])
