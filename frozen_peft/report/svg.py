# SPDX-License-Identifier: Apache-2.0
"""Figures as inline SVG that takes its colours from the page, and so follows it into the dark.

Figures are drawn in stand-in colours, one for each of the page's custom properties, and those are put in their place.
Nothing in the result refers to anything outside it: text stays text, in the page's own font.
"""

import io
import re
import warnings
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from frozen_peft.report.formats import visible

__all__ = ["COLOURS", "FONT_SIZE", "new_figure", "paper_svg", "themed_svg"]

# Custom property of the page by stand-in colour. No figure has these for any other reason.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    "series-1": "#010206",
    "series-2": "#010207",
    "series-3": "#010208",
    "series-4": "#010209",
    "series-5": "#01020a",
    "series-6": "#01020b",
    "series-7": "#01020c",
    "series-8": "#01020d",
}
FONT_SIZE = 9.5
# In inches. As many points as a telephone's screen is wide, so that text has its own size there.
_WIDTH = 4.7
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE - 0.5,
    "ytick.labelsize": FONT_SIZE - 0.5,
    "legend.fontsize": FONT_SIZE - 0.5,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["muted"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
}


def new_figure(height: float = 2.9, width: float = _WIDTH) -> tuple[Figure, matplotlib.axes.Axes]:
    """A figure in the page's style, and its axes; sizes in inches."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def themed_svg(figure: Figure, name: str, alternative: str) -> str:
    """A figure made by `new_figure` as SVG in the page's colours.

    Args:
        figure: The figure.
        name: Its name within the page, of letters and hyphens.
        alternative: What it shows, in words, for those who do not see it.
    """
    text = _svg(figure, name, alternative)
    for property_name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{property_name})")
    return text


def paper_svg(figure: Figure, name: str, alternative: str) -> str:
    """A figure with colours of its own as SVG, for a part of the page that stays white."""
    return _svg(figure, name, alternative)


def _svg(figure: Figure, name: str, alternative: str) -> str:
    file = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        # Names in scripts that the measuring font lacks are drawn by the page's.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several figures are parts of one document: neither their names nor their styles may meet.
    text = re.sub(r'(\bid=")', rf"\1{name}-", text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r'((?:xlink:)?href="#)', rf"\1{name}-", text)
    text = text.replace('<style type="text/css">*{', f'<style type="text/css">#{name} *{{')
    # The page's own font, whose widths are near enough to those that texts were measured in.
    text = re.sub(r'font-family: [^;"]*;? ?', "", text)
    label = escape(alternative, quote=True)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("<svg ", f'<svg id="{name}" role="img" aria-label="{label}" class="plot" ', 1).strip()
    # Names in it may come from files.
    return visible(text)
