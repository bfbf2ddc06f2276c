# SPDX-License-Identifier: Apache-2.0
"""The study's page and plot, from its results."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from tests.benchmarks.tables import markdown_table

__all__ = ["best_rate", "draw_figure", "render_page", "runs_of"]

Results = Mapping[str, Any]
Point = Mapping[str, float]
# A disposition counts as there from this share of held-out directions on.
ENOUGH = 0.98
FIGURES = {
    "acceptance": "directions accepted",
    "control": "questions answered",
    "kl": "KL to the base, nats per token",
    "drift_preferred": "preferred answers, nats above the base",
}
_NAMED = (
    "likelihood",
    "on policy",
    "on policy, jsd",
    "likelihood, directions alone",
    "on policy, directions alone",
    "on policy, questions retained",
    "preference",
    "likelihood, equal time",
    "likelihood, tier 3",
)
_WHEN = ("before", "after")
METHOD = """\
The demo's model (four layers, Gated DeltaNet and attention in turn, 0.5M weights) and its world: contexts of 300 to
2,000 tokens, from which the instruction to accept directions was stripped. Every training sees eight decisions a step,
the same for all objectives, each in a context of its own, three in four of them directions; for preferences each with
what the instruction is against (and for questions, a wrong answer) as the rejected one. Tier 2 but where said;
adapters of rank 16, AdamW, constant learning rate, float32, one thread. The learning rate is chosen for each objective
among three, on one seed and on scenes that are neither trained nor held out: of those that bring at least 98% of
directions the one that keeps most questions, then the one of the lowest KL. *Acceptance* is the share of held-out
directions that are accepted without the instruction, *control* the share of held-out questions answered rightly, both
by greedy decoding of the whole decision; *KL* is that of the right answers to the questions; *drift* how much likelier
than to the base the preferred answers to directions became, and the rejected ones. *Equal time* is likelihood for the
processor time of preference. *On policy*: four answers of the model's own to each prompt, judged by its base with the
instruction, by forward KL but where said. *Directions alone*: no question among the samples. *Questions retained*: the
questions are prompts from which nothing was stripped, judged by the base as it is."""


def runs_of(
    results: Results, name: str, kind: str = "runs", rate: float | None = None, seed: int | None = None
) -> Iterator[dict[str, Any]]:
    """The trainings of an objective, of all rates and seeds or one."""
    for run in results[kind]:
        if run["objective"] == name and rate in (None, run["rate"]) and seed in (None, run["seed"]):
            yield run


def best_rate(results: Results, name: str) -> float:
    """The learning rate that the trials speak for."""

    def worth(trial: Mapping[str, Any]) -> tuple[bool, float, float]:
        last = trial["curve"][-1]
        is_there = last["acceptance"] >= ENOUGH
        return (is_there, last["control"], -last["kl"]) if is_there else (is_there, last["acceptance"], -last["kl"])

    return max(runs_of(results, name, "trials"), key=worth)["rate"]


def render_page(results: Results) -> str:
    """The tables: after the last step, where acceptance is first there, gradients, and the choice of a rate."""
    names = list(dict.fromkeys(run["objective"] for run in results["runs"]))
    curves = {name: [run["curve"] for run in runs_of(results, name)] for name in names}
    header = ("objective", "rate", "steps", "acceptance", "control", "KL to base", "drift", "of rejected", "seconds")
    return "\n\n".join(
        [
            "# Which objective keeps what should stay",
            "Made by `python -m tests.benchmarks.objectives`; do not edit.",
            _filled(METHOD),
            "## After the last step",
            "Means over seeds, and in brackets the lowest and the highest of them.",
            markdown_table(header, [_row(results, name, [c[-1] for c in curves[name]]) for name in names], 1),
            f"## Where {ENOUGH:.0%} of directions are accepted for the first time",
            "At the first of the measured steps "
            f"({', '.join(map(str, results['size']['measured']))}) where they are; a seed that never gets there "
            "counts at its last step.",
            markdown_table(
                header, [_row(results, name, [_first_there(c) for c in curves[name]]) for name in names], 1
            ),
            "![Acceptance, control, KL and drift](objectives.png)",
            "## The frozen gradient beside the full one",
            _filled(
                "Cosine over all adapters of the gradient with contexts frozen with the full one, on sixteen training "
                "pairs, by plain forwards: of DPO's loss and of the chosen answers' likelihood. What passes through "
                "the context of a chosen answer and of a rejected one cancels only as far as it is the same."
            ),
            markdown_table(("adapters", "preference", "likelihood"), _cosine_rows(results), 1),
            "## The choice of a learning rate",
            markdown_table(("objective", "rate", "acceptance", "control", "KL to base"), _trial_rows(results), 1),
            *map(_filled, _conclusions(results).split("\n\n")),
        ]
    )


def draw_figure(results: Results, path: Path) -> None:
    """One panel a figure, against steps; one line a seed."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    names = list(dict.fromkeys(run["objective"] for run in results["runs"]))
    for axis, (field, label) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for color, name in enumerate(names):
            for index, run in enumerate(runs_of(results, name)):
                steps, values = [p["step"] for p in run["curve"]], [p[field] for p in run["curve"]]
                axis.plot(
                    steps,
                    values,
                    f"C{color % 10}." + ("-" if color < 10 else "--"),
                    alpha=0.7,
                    label=None if index else name,
                )
        axis.set_xlabel("steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if field == "kl":
            axis.set_yscale("log")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def _first_there(curve: Sequence[Point]) -> Point:
    return next((point for point in curve if point["acceptance"] >= ENOUGH), curve[-1])


def _row(results: Results, name: str, points: Sequence[Point]) -> tuple[str, ...]:
    rates = {f"{run['rate']:g}" for run in runs_of(results, name)}
    return (
        name,
        ", ".join(rates),
        f"{mean(point['step'] for point in points):.0f}",
        _spread([point["acceptance"] for point in points]),
        _spread([point["control"] for point in points]),
        f"{mean(point['kl'] for point in points):.4f}",
        f"{mean(point['drift_preferred'] for point in points):+.1f}",
        f"{mean(point['drift_rejected'] for point in points):+.1f}",
        f"{mean(point['seconds'] for point in points):.0f}",
    )


def _cosine_rows(results: Results) -> list[tuple[str, ...]]:
    return [
        (f"{when} training", *(f"{run[f'cosine_{when}'][name]:.3f}" for name in ("preference", "likelihood")))
        for run in results["runs"]
        if "cosine_before" in run
        for when in _WHEN
    ]


def _trial_rows(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for trial in results["trials"]:
        last = trial["curve"][-1]
        shares = (f"{last[name]:.0%}" for name in ("acceptance", "control"))
        rows.append((trial["objective"], f"{trial['rate']:g}", *shares, f"{last['kl']:.4f}"))
    return rows


def _conclusions(results: Results) -> str:
    last = {name: [run["curve"][-1] for run in runs_of(results, name)] for name in _NAMED}

    def share(name: str, figure: str = "control") -> str:
        return f"{mean(point[figure] for point in last[name]):.0%}"

    def kl(name: str) -> str:
        return f"{mean(point['kl'] for point in last[name]):.4f}"

    written, own, jsd, alone, own_alone, retained, preference, timed, full = _NAMED
    before, after = (next(r[f"cosine_{when}"] for r in results["runs"] if "cosine_before" in r) for when in _WHEN)
    return f"""\
## What holds here

*With right answers to the questions among the samples* every objective brings the disposition and keeps the rest,
each at its own learning rate: {share(written)} of the questions with likelihood, {share(own)} on policy,
{share(preference)} with preferences, and a KL of {kl(written)}, {kl(own)} and {kl(preference)}. On policy is not
nearer to the base than likelihood, at nearly three times its time: what the base would say of the very answers that
are written, the model writes as well. The generalized Jensen-Shannon divergence ({share(jsd)}, {kl(jsd)}) has one seed
that spoils more than all others. Who wants the least spoiled takes tier 3 ({share(full)}, {kl(full)}), or stops where
the disposition is there: by then no objective has lost more than a few of the questions (second table).

*Without them* they part. Directions alone cost likelihood questions ({share(alone)} kept, KL {kl(alone)}), and answers
of the model's own to directions alone {share(own_alone)} ({kl(own_alone)}). Prompts of questions, with nothing
stripped and without an answer, so that the base as it is judges what the model says to them, keep {share(retained)},
at a KL of {kl(retained)}: as much as written answers do, and nobody wrote any.

*Preferences* take twice the time of a step; likelihood in the same time goes on to spoil ({share(timed)} kept), as no
objective stops by itself. The rejected answers do what likelihood does to them without seeing them: they become as
unlikely either way.

*The frozen gradient* of a preference is no nearer to the full one than that of a likelihood:
{before["preference"]:.2f} and {before["likelihood"]:.2f} before training, {after["preference"]:.2f} and
{after["likelihood"]:.2f} after it. That what passes through the context of a chosen and of a rejected answer cancels
does not hold here: the base is nearly certain of the rejected answer, whose gradient is next to none.

One small model, one habit, seconds of training: differences of a few percent between means of three seeds mean
nothing."""


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, width=119, break_long_words=False, break_on_hyphens=False)


def _spread(shares: Sequence[float]) -> str:
    return f"{mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
