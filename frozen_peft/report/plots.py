# SPDX-License-Identifier: Apache-2.0
"""The report's plots. Each is given numbers and returns SVG; what tells series apart is never colour alone."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from frozen_peft.report.svg import COLOURS, new_figure, themed_svg

__all__ = [
    "MAX_POINTS",
    "Bar",
    "Interval",
    "Point",
    "bars_plot",
    "intervals_plot",
    "loss_plot",
    "thinned",
    "tokens_plot",
]

Point = tuple[float, float]

MAX_POINTS = 400
_SERIES = tuple(name for name in COLOURS if name.startswith("series-"))
_MARKERS = "osD^v"
# Characters of a label that there is room for beside bars.
_LABEL_CHARACTERS = 24


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        title: What it is.
        value: Its length, 0 or more.
        text: Its length in words.
        outlined: Drawn as an outline: a figure that was planned, not measured.
    """

    title: str
    value: float
    text: str
    outlined: bool = False


@dataclass(frozen=True)
class Interval:
    """A share before and after, each `(rate, low, high)` or None."""

    title: str
    before: tuple[float, float, float] | None
    after: tuple[float, float, float] | None


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points: means over so many neighbours as that takes; gaps stay where all are not finite."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    means = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        known = [y for _, y in group if math.isfinite(y)]
        means.append((group[-1][0], sum(known) / len(known) if known else math.nan))
    return means


def loss_plot(train: Sequence[Point], held_out: Mapping[str, Sequence[Point]]) -> str:
    """Training loss and held-out losses by step."""
    figure, axes = new_figure()
    if train:
        steps, losses = zip(*thinned(train), strict=True)
        marker = "." if len(train) <= 30 else ""
        axes.plot(steps, losses, color=COLOURS["series-1"], marker=marker, linewidth=1.6, label="training")
    for number, (name, points) in enumerate(held_out.items()):
        steps, losses = zip(*thinned(points), strict=True)
        axes.plot(
            steps,
            losses,
            color=COLOURS[_SERIES[1 + number % (len(_SERIES) - 1)]],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle="--",
            markersize=5,
            linewidth=1.4,
            label=_short(name),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _legend(figure, axes)
    return themed_svg(figure, "plot-loss", _loss_words(train, held_out))


def bars_plot(name: str, bars: Sequence[Bar], what: str) -> str:
    """Bars below each other with their lengths written behind them.

    Args:
        name: The figure's name in the page.
        bars: The longest of which is as wide as the plot.
        what: What they show, for those who do not see it.
    """
    figure, axes = new_figure(height=0.45 + 0.32 * len(bars))
    for number, bar in enumerate(bars):
        colour = COLOURS[_SERIES[number % len(_SERIES)]]
        fill: dict[str, Any] = {"facecolor": "none", "hatch": "///"} if bar.outlined else {"facecolor": colour}
        axes.barh(number, bar.value, height=0.62, edgecolor=colour, linewidth=1.2, **fill)
        axes.annotate(
            bar.text,
            (bar.value, number),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS["ink"],
            parse_math=False,
        )
    _name_rows(axes, [bar.title for bar in bars])
    # Room for what is written behind the longest bar.
    axes.set_xlim(0, 1.45 * max([bar.value for bar in bars if bar.value > 0], default=1.0))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    words = "; ".join(f"{bar.title} {bar.text}" for bar in bars)
    return themed_svg(figure, name, f"{what}: {words}.")


def tokens_plot(windows: Sequence[tuple[float, float, float]]) -> str:
    """Context tokens that were encoded and reused between logs: each `(step, encoded, reused)`."""
    figure, axes = new_figure()
    encoded = thinned([(step, number) for step, number, _ in windows])
    reused = thinned([(step, number) for step, _, number in windows])
    steps = [step for step, _ in encoded]
    width = 0.8 * min((b - a for a, b in itertools.pairwise(steps) if b > a), default=1.0)
    below = [number for _, number in encoded]
    axes.bar(steps, below, width, color=COLOURS["series-1"], label="encoded")
    axes.bar(
        steps,
        [number for _, number in reused],
        width,
        bottom=below,
        facecolor="none",
        edgecolor=COLOURS["series-2"],
        hatch="////",
        label="reused",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("context tokens")
    axes.yaxis.set_major_formatter(lambda value, _: _thousands(value))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _legend(figure, axes)
    total_encoded, total_reused = (sum(window[column] for window in windows) for column in (1, 2))
    words = f"Context tokens per log: {total_encoded:,.0f} encoded and {total_reused:,.0f} reused in all."
    return themed_svg(figure, "plot-tokens", words)


def intervals_plot(name: str, rows: Sequence[Interval], confidence: float) -> str:
    """Shares with their intervals, before and after below each other."""
    figure, axes = new_figure(height=0.85 + 0.42 * len(rows))
    drawn = (
        ("before", "before", "series-2", "o", -0.14),
        ("after", "after", "series-1", "D", 0.14),
    )
    for label, attribute, colour, marker, offset in drawn:
        found = [(number, value) for number, row in enumerate(rows) if (value := getattr(row, attribute)) is not None]
        if not found:
            continue
        rates = [value[0] for _, value in found]
        axes.errorbar(
            rates,
            [number + offset for number, _ in found],
            xerr=[
                [max(value[0] - value[1], 0) for _, value in found],
                [max(value[2] - value[0], 0) for _, value in found],
            ],
            fmt=marker,
            color=COLOURS[colour],
            capsize=3,
            markersize=5,
            linewidth=1.5,
            label=label,
        )
    _name_rows(axes, [row.title for row in rows])
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel(f"preferred, {confidence:.0%} intervals")
    _legend(figure, axes)
    words = "; ".join(f"{row.title}: {_rate(row.before)} before, {_rate(row.after)} after training" for row in rows)
    return themed_svg(figure, name, f"Share of probes whose preferred decision is the more likely one. {words}.")


def _name_rows(axes: Any, titles: Sequence[str]) -> None:
    axes.set_yticks(range(len(titles)))
    for label in axes.set_yticklabels([_short(title) for title in titles]):
        label.set_parse_math(False)
    axes.set_ylim(len(titles) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def _legend(figure: Any, axes: Any) -> None:
    """Above the plot, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _short(text: str) -> str:
    return text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"


def _thousands(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _rate(value: tuple[float, float, float] | None) -> str:
    return "not measured" if value is None else f"{value[0]:.0%}"


def _loss_words(train: Sequence[Point], held_out: Mapping[str, Sequence[Point]]) -> str:
    parts = [
        f"{name} loss from {points[0][1]:.4f} at step {points[0][0]:.0f} to {points[-1][1]:.4f} at {points[-1][0]:.0f}"
        for name, points in {"training": train, **held_out}.items()
        if points
    ]
    return f"Loss by step: {'; '.join(parts)}."
