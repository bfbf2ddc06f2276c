# SPDX-License-Identifier: Apache-2.0
"""Reads figures out of the study's results, for the page and the plot."""

from statistics import mean
from typing import Any

from tests.benchmarks.enough.study import HORIZONS, TRAINED_HORIZONS

LABELS = {name: f"last {name} tokens" for name in HORIZONS} | {"frozen": "frozen (tier 2)", "full": "full (tier 3)"}
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
