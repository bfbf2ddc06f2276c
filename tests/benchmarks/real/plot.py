# SPDX-License-Identifier: Apache-2.0
"""Draws what was measured; the only module here that needs matplotlib."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

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
            found, planned = len(reader.runs(task, method)), len(reader.size.seeds)
            axis.plot(seconds, shares, marker="o", color=colors[method], label=method)
            if found < planned:
                told = {"xytext": (6, 7), "textcoords": "offset points", "ha": "right", "fontsize": 8}
                axis.annotate(f"{found} of {planned} seeds", (seconds[-1], shares[-1]), **told)
        if reader.measured_methods(task):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        else:
            axis.text(0.5, 0.5, "no training measured yet", ha="center", transform=axis.transAxes)
            axis.set_xticks([])
        axis.set_title(f"task: {task}")
        axis.set_xlabel("processor seconds in training steps")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out targets met exactly")
    # What one panel lacks another may have.
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=90)
