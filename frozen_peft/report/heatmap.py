# SPDX-License-Identifier: Apache-2.0
"""The heat map of a gradient flow: what passes through the context, and where the frozen gradient points elsewhere."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    height = 1.8 + max(0.22 * len(layers), 1.4)
    figure = Figure(figsize=(2.4 + 1.0 * len(roles), height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(
        figure, left, share, layers, roles, "share through the context", "viridis", (0.0, max(1.0, _largest(share)))
    )
    _panel(figure, right, cosine, layers, roles, "cosine, frozen and full gradient", "RdBu", (-1.0, 1.0))
    left.set_ylabel("layer")
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


def _largest(grid: np.ndarray) -> float:
    return float(np.nanmax(grid)) if not np.isnan(grid).all() else 1.0


def _panel(
    figure: Figure,
    axis: Axes,
    grid: np.ndarray,
    layers: list[int],
    roles: list[str],
    title: str,
    colours: str,
    limits: tuple[float, float],
) -> None:
    image = axis.imshow(grid, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(roles)), roles, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    step = -(-len(layers) // MAX_LAYERS_WITH_NUMBERS)
    axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
    if len(layers) > MAX_LAYERS_WITH_NUMBERS:
        return
    for (layer, role), value in np.ndenumerate(grid):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            colour = "white" if dark else "black"
            axis.text(role, layer, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
