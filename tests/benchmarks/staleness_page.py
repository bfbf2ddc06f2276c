# SPDX-License-Identifier: Apache-2.0
"""The page about `max_context_staleness`: what it saves and what it costs on the demo's task."""

import statistics
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import measure_on_one_thread
from tests.benchmarks.tables import Page, markdown_table

STALENESS = (0, 1, 4, 16)
# Seeds by learning rate: the demo's, and three times as much, since contexts age with the steps that adapters take.
SEEDS = {3e-3: (0, 1, 2), 1e-2: (0,)}
KINDS = {"recurrent": "recurrent states", "keys": "keys", "values": "values", "gradient": "gradient"}
HEADER = (
    "learning rate", "staleness", "held-out loss", "against 0", "smallest", "largest",
    "hit rate", "processor s per step", "time saved",
)  # fmt: skip
TEXT = """# Contexts of some staleness

Made by `python -m tests.benchmarks staleness`; do not edit.

![Held-out loss, time saved and drift](staleness.png)

The demo's model trains on its own task with `max_context_staleness` of 0 (exact), 1, 4 and 16. Documents are 40 \
entries of the standard library's documentation, name and summary ({context_tokens:.0f} tokens on average with the \
question). For 20 steps every step asks two questions about each of the same four documents, then come four others, \
{steps} steps in all: a schedule in which all contexts come again in the next step, so that staleness saves, and \
could harm, as much as it can. The other settings are those of the demo's tier 2, and a second learning rate makes \
contexts age faster. Runs of one seed differ in staleness alone. The held-out loss is taken at the end on \
{held_out_samples} questions about held-out modules, over contexts that are encoded anew, in nats per token; \
*against 0* is the mean over seeds ({seeds}) of the difference to the exact run of that seed, with its smallest and \
largest. At the higher rate a single seed says nothing about a sign. Time is processor time on one thread; what \
little is left to encode with a staleness of 16 are mostly the questions, each by itself.

{table}

How much contexts age, in the exact run of seed 0: the norm of the change over so many steps, relative to the norm, \
of what contexts are encoded to, and of the gradient of the adapters that a step would take from them. Mean over the \
steps.

{drift}

What this shows, and what it does not. With a context of other entries in place of the right one, the held-out loss \
rises by {worth}: the demo's model makes little use of its contexts, so its loss cannot suffer much from what \
staleness does to them, and equal losses are no evidence that a model which lives on its contexts would not mind. \
What does carry over is the second table: how far states drift in so many steps depends on how far the adapters \
move, and the gradient's error says how wrong the steps were that the stale runs took. Measure both on a model of \
your own before allowing more than 0.
"""


def staleness_page(assets: Path | None, output: Path) -> Page:
    """Trains all runs, and draws the plot into the folder of the results."""
    options = {} if assets is None else {"assets": assets}
    figures, aged = [], []
    for rate, seeds in SEEDS.items():
        for seed in seeds:
            for staleness in STALENESS:
                print(f"staleness {staleness}, rate {rate}, seed {seed} ...", file=sys.stderr, flush=True)
                figures.append(
                    measure_on_one_thread("staleness", staleness=staleness, seed=seed, learning_rate=rate, **options)
                )
        print(f"drift, rate {rate} ...", file=sys.stderr, flush=True)
        aged.append(measure_on_one_thread("staleness", staleness=0, learning_rate=rate, drift=True, **options))
    return make_page(figures, aged, output)


def make_page(figures: list[dict[str, Any]], aged: list[dict[str, Any]], output: Path) -> Page:
    """Plot and text of the runs, and of those that measured drift."""
    output.mkdir(parents=True, exist_ok=True)
    summaries = [summary(figures, rate, staleness) for rate in SEEDS for staleness in STALENESS]
    plot(summaries, aged, output / "staleness.png")
    after = " and ".join(f"{run['context_worth'][1]:.3f} ({run['learning_rate']:g})" for run in aged)
    worth = f"{aged[0]['context_worth'][0]:.3f} nats before training and by {after} after it"
    text = TEXT.format(
        **{name: figures[0][name] for name in ("context_tokens", "steps", "held_out_samples")},
        seeds=" and ".join(f"{len(seeds)} at {rate:g}" for rate, seeds in SEEDS.items()),
        table=markdown_table(HEADER, [row(found) for found in summaries]),
        drift=drift_table(aged),
        worth=worth,
    )
    return Page("staleness", text.rstrip(), [*figures, *aged])


def summary(figures: list[dict[str, Any]], rate: float, staleness: int) -> dict[str, Any]:
    """One staleness over all seeds, each against its exact run."""
    runs = [run for run in figures if (run["learning_rate"], run["staleness"]) == (rate, staleness)]
    exact = {run["seed"]: run for run in figures if (run["learning_rate"], run["staleness"]) == (rate, 0)}
    return {
        "learning_rate": rate,
        "staleness": staleness,
        "held_out_loss": statistics.mean(run["held_out_loss"] for run in runs),
        "differences": [run["held_out_loss"] - exact[run["seed"]]["held_out_loss"] for run in runs],
        "hit_rate": statistics.mean(run["hit_rate"] for run in runs),
        "seconds_per_step": statistics.mean(run["cpu_seconds"] / run["steps"] for run in runs),
        "saved": [1 - run["cpu_seconds"] / exact[run["seed"]]["cpu_seconds"] for run in runs],
    }


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    differences = found["differences"]
    return (
        f"{found['learning_rate']:g}",
        f"{found['staleness']}",
        f"{found['held_out_loss']:.4f}",
        *(f"{value:+.5f}" for value in (statistics.mean(differences), min(differences), max(differences))),
        f"{found['hit_rate']:.3f}",
        f"{found['seconds_per_step']:.2f}",
        f"{statistics.mean(found['saved']):.0%}",
    )


def drift_table(aged: list[dict[str, Any]]) -> str:
    """Change by learning rate, kind and number of steps."""
    lags = sorted({int(name.partition("/")[2]) for name in aged[0]["drift"]})
    lines = [
        (f"{run['learning_rate']:g}", title, *(f"{run['drift'][f'{kind}/{lag}']:.2%}" for lag in lags))
        for run in aged
        for kind, title in KINDS.items()
    ]
    steps = [f"{lag} step" if lag == 1 else f"{lag} steps" for lag in lags]
    return markdown_table(("learning rate", "change of", *steps), lines, num_words=2)


def plot(summaries: list[dict[str, Any]], aged: list[dict[str, Any]], path: Path) -> None:
    """Loss against the exact run with every seed, time saved, and drift."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    loss, time, drift = figure.subplots(1, 3)
    places = range(len(STALENESS))
    for number, rate in enumerate(SEEDS):
        found = [entry for entry in summaries if entry["learning_rate"] == rate]
        color, shift = f"C{number}", 0.08 * (2 * number - 1)
        label = f"learning rate {rate:g}"
        for axes, name, scale in ((loss, "differences", 1.0), (time, "saved", 100.0)):
            values = [[scale * value for value in entry[name]] for entry in found]
            means = [statistics.mean(of_seeds) for of_seeds in values]
            axes.plot([place + shift for place in places], means, color=color, label=label)
            for place, of_seeds in zip(places, values, strict=True):
                axes.scatter([place + shift] * len(of_seeds), of_seeds, color=color, s=14)
        for kind, style in (("recurrent", "-"), ("keys", "--"), ("gradient", ":")):
            lags = sorted({int(key.partition("/")[2]) for key in aged[number]["drift"]})
            changes = [100 * aged[number]["drift"][f"{kind}/{lag}"] for lag in lags]
            drift.plot(lags, changes, style, marker="o", markersize=4, color=color, label=f"{KINDS[kind]}, {rate:g}")
    loss.axhline(0.0, color="0.7", linewidth=0.8, zorder=0)
    loss.set_title("Held-out loss against the exact run")
    loss.set_ylabel("nats per token; dots are seeds")
    time.set_title("Time saved")
    time.set_ylabel("% of processor time")
    for axes in (loss, time):
        axes.set_xticks(list(places), [str(staleness) for staleness in STALENESS])
        axes.set_xlabel("max_context_staleness, steps")
        axes.legend(frameon=False)
    drift.set(xscale="log", yscale="log", title="How contexts age", xlabel="age, steps", ylabel="relative change, %")
    drift.set_xticks(lags, [str(lag) for lag in lags])
    drift.yaxis.set_major_formatter("{x:g}")
    drift.minorticks_off()
    drift.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
