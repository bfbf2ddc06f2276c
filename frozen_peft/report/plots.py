# SPDX-License-Identifier: Apache-2.0
"""The report's plots, and the heat map of a gradient flow, as inline SVG.

It takes its colours from the page and so follows it into the dark: figures are drawn in stand-in colours, one for each
of the page's custom properties, and those are put in their place. Nothing in the result refers to anything outside it:
text stays text, in the page's own font. What tells series apart is never colour alone.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from frozen_peft.adapters import ROLES
from frozen_peft.report.formats import visible

__all__ = ["MAX_POINTS", "Point", "as_svg", "draw_heatmap", "lines_plot", "thinned"]

Point = tuple[float, float]

MAX_POINTS = 400
# Cells with numbers up to this many layers; beyond, colour alone can be read.
MAX_LAYERS_WITH_NUMBERS = 40
_SERIES = ("series-1", "series-2", "series-3", "series-4")
# Stand-in colour of each custom property of the page. No figure has these for any other reason.
_COLOURS = {name: f"#0102{number:02x}" for number, name in enumerate(("ink", "muted", "grid", *_SERIES), start=3)}
_MARKERS = "osD^"
# Characters of a label that there is room for.
_LABEL_CHARACTERS = 24
# In inches. As many points as a telephone's screen is wide, so that text has its own size there.
_SIZE = (4.7, 2.9)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.labelsize": 9.5,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.edgecolor": _COLOURS["muted"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.labelcolor": _COLOURS["ink"],
    "grid.color": _COLOURS["grid"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points: means over so many neighbours as that takes."""
    size = max(-(-len(points) // MAX_POINTS), 1)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def lines_plot(name: str, series: Mapping[str, Sequence[Point]], what: str) -> str:
    """Series by step, the first one as a line and the others dashed, with marks.

    Args:
        name: The figure's name within the page, of letters and hyphens.
        series: Points of each, at least one, in the order of their steps.
        what: What their height is.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
    for number, (title, points) in enumerate(series.items()):
        steps, heights = zip(*thinned(points), strict=True)
        marker = _MARKERS[number % len(_MARKERS)] if number else "." if len(points) <= 30 else ""
        axes.plot(
            steps,
            heights,
            color=_COLOURS[_SERIES[number % len(_SERIES)]],
            linestyle="--" if number else "-",
            marker=marker,
            markersize=5,
            label=title if len(title) <= _LABEL_CHARACTERS else f"{title[: _LABEL_CHARACTERS - 1]}…",
        )
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter("{x:,g}")
    # Above the plot, where it covers nothing.
    for text in figure.legend(loc="outside upper left", ncols=2, frameon=False).get_texts():
        text.set_parse_math(False)
    words = "; ".join(
        f"{title} from {points[0][1]:,.6g} at step {points[0][0]:.0f} to {points[-1][1]:,.6g} at {points[-1][0]:.0f}"
        for title, points in series.items()
    )
    return as_svg(figure, name, f"{what} by step: {words}.")


def as_svg(figure: Figure, name: str, alternative: str) -> str:
    """A figure as SVG to be put into the page, where colours of this module become the page's.

    Args:
        figure: The figure.
        name: Its name within the page, of letters and hyphens.
        alternative: What it shows, in words, for those who do not see it.
    """
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Names in scripts that the measuring font lacks are drawn by the page's.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several figures are parts of one document: neither their names nor their styles may meet.
    text = re.sub(r'(\bid="|url\(#|(?:xlink:)?href="#)', rf"\1{name}-", text)
    text = text.replace('<style type="text/css">*{', f'<style type="text/css">#{name} *{{')
    # The page's own font, whose widths are near enough to those that texts were measured in.
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    label = escape(alternative, quote=True)
    text = text.replace("<svg ", f'<svg id="{name}" role="img" aria-label="{label}" class="plot" ', 1).strip()
    for property_name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{property_name})")
    # Names in it may come from files.
    return visible(text)


def draw_heatmap(flow: Mapping[str, Any]) -> Figure:
    """Draws layers against roles: the share of the full gradient that passes through the context, and the cosine.

    Where several modules of a layer have one role (those of an MLP), they count as one. White cells have no adapter,
    or no gradient.

    Args:
        flow: What `gradient_flow.json` holds (`GradientFlow.as_dict`).

    Returns:
        A figure of two panels.

    Raises:
        ValueError: There is no adapted projection in it.
    """
    rows = flow["gradient"]
    if not rows:
        raise ValueError("The gradient flow has no adapted projections to draw.")
    present = {row["role"] for row in rows}
    roles = [role for role in (*ROLES, "other") if role in present]
    layers = sorted({row["layer"] for row in rows})
    cosine, share = _grids(rows, layers, roles)
    step = -(-len(layers) // MAX_LAYERS_WITH_NUMBERS)
    figure = Figure(figsize=(2.4 + 1.0 * len(roles), 1.8 + max(0.22 * len(layers), 1.4)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, title, grid, colours, least in (
        (panels[0], "share through the context", share, "viridis", 0.0),
        (panels[1], "cosine, frozen and full gradient", cosine, "RdBu", -1.0),
    ):
        # A share may be above 1; where there is none, it is NaN.
        largest = np.fmax.reduce(grid, axis=None, initial=1.0)
        image = axis.imshow(grid, vmin=least, vmax=largest, cmap=colours, aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(roles)), roles, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
        figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
        if step == 1:
            _write_numbers(axis, image, grid)
    panels[0].set_ylabel("layer")
    tokens = flow["tokens"]
    figure.suptitle(
        f"Gradient flow of {flow['samples']:,} samples, {tokens['context']:,} tokens of context and "
        f"{tokens['decision']:,} of decisions",
        fontsize=9,
    )
    return figure


def _grids(rows: list[dict[str, Any]], layers: list[int], roles: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and share, shape `(layers, roles)`, NaN where there is none."""
    frozen, full, product, difference = np.zeros((4, len(layers), len(roles)))
    for row in rows:
        cell = layers.index(row["layer"]), roles.index(row["role"])
        frozen[cell] += row["frozen_norm"] ** 2
        full[cell] += row["full_norm"] ** 2
        product[cell] += (row["cosine"] or 0.0) * row["frozen_norm"] * row["full_norm"]
        difference[cell] += ((row["context_share"] or 0.0) * row["full_norm"]) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return product / np.sqrt(frozen * full), np.sqrt(difference / full)


def _write_numbers(axis: Axes, image: AxesImage, grid: np.ndarray) -> None:
    """Writes every cell's value into it, in the colour that can be read on the cell's own."""
    for (layer, role), value in np.ndenumerate(grid):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
            axis.text(role, layer, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
