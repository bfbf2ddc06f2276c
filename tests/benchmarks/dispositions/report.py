# SPDX-License-Identifier: Apache-2.0
"""The study's page and plot, from its results."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from tests.benchmarks.dispositions.study import EQUAL_TIME
from tests.benchmarks.tables import markdown_table

__all__ = ["draw_figure", "render_page"]

HEADER = ("compared", "training", "steps", "acceptance", "control", "KL to base", "processor seconds")
FIGURES = {
    "acceptance": "directions accepted",
    "control": "questions answered",
    "kl": "KL to the base, nats per token",
}

Results = Mapping[str, Any]
# Of all seeds, by group and name.
Curves = dict[tuple[str, str], list[list[dict[str, float]]]]


def render_page(results: Results) -> str:
    """The tables: after the last step for every training, and acceptance as it goes."""
    curves = _by_training(results)
    rows = [_row(group, name, runs) for (group, name), runs in curves.items()]
    steps = results["size"]["measured"]
    courses = [
        (
            group,
            name,
            *(
                _spread([point["acceptance"] for run in runs for point in run if point["step"] == step])
                for step in steps
            ),
        )
        for (group, name), runs in curves.items()
        if EQUAL_TIME not in name
    ]
    base = results["base"]
    return "\n\n".join(
        [
            "# What moves a disposition",
            "Made by `python -m tests.benchmarks.dispositions`; do not edit.",
            _filled(results["method"]),
            f"Before training {base['acceptance']:.0%} of directions are accepted and {base['control']:.1%} of "
            f"questions answered; with the instruction in the context {base['instructed']:.0%} of directions.",
            "## After the last step",
            "Means over seeds, and in brackets the lowest and the highest of them.",
            markdown_table(HEADER, rows, num_words=2),
            "## Directions accepted after so many steps",
            markdown_table(("compared", "training", *map(str, steps)), courses, num_words=2),
            "![Acceptance, control and KL against steps and time](dispositions.png)",
            *map(_filled, _conclusions(curves).split("\n\n")),
        ]
    )


def draw_figure(results: Results, path: Path) -> None:
    """One row a comparison: acceptance against steps and against time, control and KL against steps."""
    curves = _by_training(results)
    groups = list(dict.fromkeys(group for group, _ in curves))
    figure = Figure(figsize=(15, 2.9 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 4, squeeze=False)
    for line, group in enumerate(groups):
        own = {name: runs for (g, name), runs in curves.items() if g == group and EQUAL_TIME not in name}
        panels = [("step", "acceptance"), ("seconds", "acceptance"), ("step", "control"), ("step", "kl")]
        for axis, (x, y) in zip(axes[line], panels, strict=True):
            for color, (name, runs) in enumerate(own.items()):
                for index, run in enumerate(runs):
                    xs, ys = [point[x] for point in run], [point[y] for point in run]
                    axis.plot(xs, ys, f"C{color}.-", alpha=0.8, label=name if index == 0 else None)
            axis.set_xlabel("steps" if x == "step" else "processor seconds")
            axis.set_ylabel(FIGURES[y])
            axis.grid(alpha=0.3)
            if y != "kl":
                axis.set_ylim(-0.03, 1.03)
        axes[line, 0].set_title(group, loc="left")
        axes[line, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def _by_training(results: Results) -> Curves:
    """Curves of all seeds by group and name; what tier 2 is compared with is in every group."""
    curves: Curves = {}
    groups = list(dict.fromkeys(run["group"] for run in results["runs"]))
    for group in groups:
        shared = results["shared"].get(group)
        for run in results["runs"]:
            if run["group"] == group or (shared and run["name"] == "tier 2"):
                name = run["name"] if run["group"] == group else shared
                curves.setdefault((group, name), []).append(run["curve"])
    return curves


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, width=119, break_long_words=False, break_on_hyphens=False)


def _conclusions(curves: Curves) -> str:
    early = {key: f"{mean(run[0]['acceptance'] for run in runs):.0%}" for key, runs in curves.items()}
    control = {key: f"{mean(run[-1]['control'] for run in runs):.0%}" for key, runs in curves.items()}
    tier_1, tier_2, tier_3 = (("tier", f"tier {number}") for number in (1, 2, 3))
    mlp, every, off = ("preset", "response+mlp"), ("preset", "all-linear"), ("context_adapters", "off")
    one, four, sixteen = (("contexts per decision", count) for count in ("1", "4", "16"))
    timed = [run[-1] for run in curves["tier", f"tier 3, {EQUAL_TIME}"]]
    timed_steps = f"{mean(point['step'] for point in timed):.0f}"
    timed_acceptance = f"{mean(point['acceptance'] for point in timed):.0%}"
    return f"""\
## What holds here

*Tiers.* All three bring the disposition. A step of tier 3 does more (at the first measurement {early[tier_3]} are
accepted, {early[tier_1]} in tier 1, {early[tier_2]} in tier 2) and spoils less: {control[tier_3]} of the questions
remain, {control[tier_2]} in tier 2. Tier 2 wins where time counts: in its time tier 3 gets {timed_steps} steps, and
{timed_acceptance} acceptance. Where what must not change matters more than time, use tier 3, or try tier 2 with a
smaller learning rate (the demo takes 3e-3).

*Presets.* More adapters learn in fewer steps ({early[every]} and {early[mlp]} at the first measurement) and keep no
more of the questions ({control[every]} and {control[mlp]}). 'LoRA Without Regret' (adapt every layer) holds for speed
here, not for what is kept. PreFT's finding, that adapting the prefill alone nearly suffices, was not tested; its
reverse was: with contexts encoded by the base (`context_adapters` off) the disposition comes as well, and
{control[off]} of the questions remain.

*Loss.* Distillation is likelihood here, to the figures shown: the teacher is nearly certain of the very decision that
is written, so its distribution says no more, at one and a half times the cost.

*Variety.* Sixteen decisions, all of them directions, spoil the questions whatever the contexts ({control[one]},
{control[four]} and {control[sixteen]} with 1, 4 and 16): held-out acceptance does not tell them apart. What protects
the control is that questions are trained too, as in all other rows.

One small model, one habit, seconds of training: differences of a few percent between means of three seeds mean
nothing."""


def _row(group: str, name: str, runs: Sequence[Sequence[Mapping[str, float]]]) -> tuple[str, ...]:
    last = [run[-1] for run in runs]
    return (
        group,
        name,
        f"{mean(point['step'] for point in last):.0f}",
        _spread([point["acceptance"] for point in last]),
        _spread([point["control"] for point in last]),
        f"{mean(point['kl'] for point in last):.4f}",
        f"{mean(point['seconds'] for point in last):.0f}",
    )


def _spread(shares: Sequence[float]) -> str:
    return f"{mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
