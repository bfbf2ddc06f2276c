# SPDX-License-Identifier: Apache-2.0
"""Draws the study's results; the only module here that needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tests.benchmarks.enough.report import COMPARED, LABELS, curves_of, gradient_figure, parts_in_order
from tests.benchmarks.enough.study import TASKS, TRAINED_HORIZONS

COLORS = {"frozen": "tab:blue", "128": "tab:orange", "full": "tab:green"}
X_AXES = {"steps": "steps", "seconds": "processor seconds in training steps"}


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
