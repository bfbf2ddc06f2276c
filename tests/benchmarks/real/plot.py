# SPDX-License-Identifier: Apache-2.0
"""Draws what was measured; the only module here that needs matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure

from tests.benchmarks.real.methods import BASE, METHODS
from tests.benchmarks.real.report import Reader, exact_rate


def draw_figure(reader: Reader, path: Path) -> None:
    """Targets met against processor time, one panel per task; what was not measured has no line."""
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    colors = {method.name: f"C{index}" for index, method in enumerate(METHODS)}
    for axis, task in zip(
        figure.subplots(1, len(reader.size.tasks), sharey=True, squeeze=False)[0], reader.size.tasks, strict=True
    ):
        for condition, style in (("given", ":"), ("examples", "--")):
            for scores in reader.scores(task, BASE, condition):
                label = "base" if condition == "given" else "base, examples before the text"
                axis.axhline(exact_rate(scores, ("target",)), color="black", linestyle=style, label=label)
        for method in reader.measured_methods(task):
            points = reader.points(task, method)
            seconds, shares = [seconds for _, seconds, _ in points], [rate for _, _, rate in points]
            label = f"{method} ({len(reader.runs(task, method))} of {len(reader.size.seeds)} seeds)"
            axis.plot(seconds, shares, marker="o", color=colors[method], label=label)
        if reader.measured_methods(task):
            axis.set_xscale("log")
        else:
            axis.text(0.5, 0.5, "no training measured yet", ha="center", transform=axis.transAxes)
        axis.set_title(f"task: {task}")
        axis.set_xlabel("processor seconds in training steps")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("held-out targets met exactly")
    figure.savefig(path, dpi=90)
