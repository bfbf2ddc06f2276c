# SPDX-License-Identifier: Apache-2.0
"""Draws the study's figures and writes its page; every number in the text comes from the results."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure

from tests.benchmarks.enough.study import HORIZONS, TASKS, TRAINED_HORIZONS

COLORS = {"frozen": "tab:blue", "128": "tab:orange", "full": "tab:green"}
LABELS = {name: f"last {name} tokens" for name in HORIZONS} | {"frozen": "frozen (tier 2)", "full": "full (tier 3)"}
X_AXES = {"steps": "steps", "seconds": "processor seconds in training steps"}
COMPARED = [name for name in HORIZONS if name != "full"]


def parts_in_order(results: dict[str, Any]) -> list[str]:
    """Roles of each layer, and all of them, in the order of the model."""
    return list(dict.fromkeys(row["part"] for row in results["gradients"]))


def gradient_figure(results: dict[str, Any], task: str, part: str, horizon: str, name: str) -> float:
    """Mean over seeds of the `cosine` or `norm` of one part of the gradient; NaN where the gradient is zero."""
    values = [
        row[name]
        for row in results["gradients"]
        if (row["task"], row["part"], row["horizon"]) == (task, part, horizon)
    ]
    return float("nan") if None in values else mean(values)


def curves_of(results: dict[str, Any], task: str, preset: str, horizon: str) -> list[dict[str, Any]]:
    """The trainings of one task and horizon, one per seed."""
    return [
        curve
        for curve in results["curves"]
        if (curve["task"], curve["preset"], curve["horizon"]) == (task, preset, horizon)
    ]


def at_equal_steps(curves: list[dict[str, Any]], name: str) -> float:
    """Mean over seeds of a figure at the end."""
    return mean(curve[name][-1] for curve in curves)


def at_equal_time(curves: list[dict[str, Any]], name: str, seconds: float) -> float:
    """Mean over seeds of a figure at the last evaluation within `seconds` of training."""
    return mean(curve[name][sum(spent <= seconds for spent in curve["seconds"]) - 1] for curve in curves)


def shortest_seconds(results: dict[str, Any], task: str, preset: str) -> float:
    """Time of the quickest whole training of a task: what every method is given for the comparison at equal time."""
    every = [curve for horizon in TRAINED_HORIZONS for curve in curves_of(results, task, preset, horizon)]
    return min(curve["seconds"][-1] for curve in every)


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """Heat maps of the cosines above, accuracy against steps and against time below."""
    figure = Figure(figsize=(13, 14), layout="constrained")
    heat, curves = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    _draw_cosines(heat, results)
    _draw_curves(curves, results)
    figure.savefig(path, dpi=90)


def _draw_cosines(figure: Any, results: dict[str, Any]) -> None:
    figure.suptitle("Cosine with the full gradient at the start, by layer and role")
    parts, tasks = parts_in_order(results), list(dict.fromkeys(task.name for task in TASKS))
    axes = figure.subplots(1, len(tasks), sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        values = np.array([[gradient_figure(results, task, part, h, "cosine") for h in COMPARED] for part in parts])
        image = axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            text = "0" if np.isnan(value) else f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", color="white" if abs(value) > 0.7 else "black")
        axis.set_title(f"task: {task}")
        axis.set_xticks(range(len(COMPARED)), [LABELS[horizon] for horizon in COMPARED])
        axis.set_yticks(range(len(parts)), parts)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_curves(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.subplots(2, len(TASKS), sharey=True)
    for column, task in enumerate(TASKS):
        for row, (name, label) in enumerate(X_AXES.items()):
            axis = axes[row, column]
            for horizon in TRAINED_HORIZONS:
                for index, curve in enumerate(curves_of(results, task.name, task.preset, horizon)):
                    label_once = LABELS[horizon] if index == 0 else None
                    axis.plot(curve[name], curve["accuracy"], color=COLORS[horizon], label=label_once, marker=".")
            axis.set_xlabel(label)
            axis.set_ylim(-0.03, 1.03)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"task: {task.name}, preset: {task.preset}")
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out accuracy")
    axes[0, 0].legend()
