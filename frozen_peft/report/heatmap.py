# SPDX-License-Identifier: Apache-2.0
"""The heat map of a gradient flow: what passes through the context, and where the frozen gradient points elsewhere."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from frozen_peft.adapters import ROLES

__all__ = ["draw_heatmap"]

# Cells with numbers up to this many layers; beyond, colour alone can be read.
MAX_LAYERS_WITH_NUMBERS = 40


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
