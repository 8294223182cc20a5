"""Pictures of attention over an image: a grid of layers and heads, and a teacher beside its student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..report.heat import HEAT, SIGNED, draw_heat
from ..report.ink import INK, Array, new_figure
from .look import Look, token_name

INCHES = 1.35
"""The longer side of a panel; less where there are many."""
LARGEST = 22.0


@dataclass(frozen=True)
class Panel:
    """What one query takes from each patch, (rows, columns), and whether weights may be negative."""

    heat: Array
    signed: bool = False
    but: int | None = None
    """A patch that the color scale does not follow: in a rollout, the query's own residual outshines all others."""

    @property
    def top(self) -> float:
        """The weight that has the strongest color."""
        weights = np.abs(self.heat).ravel()
        return float(weights.max() if self.but is None else np.delete(weights, self.but).max(initial=0.0))


def draw_grid(
    picture: Array, look: Look, rolled: Array, query: int, layers: Sequence[int], title: str
) -> Figure:
    """Draw a row a layer: the mean of the heads, the rollout up to there, then each head."""
    heads = look.maps.shape[1]
    columns = ["mean", "rollout", *(f"head {head}" for head in range(heads))]
    rows = []
    for layer in layers:
        maps, signed = look.maps[layer], look.signed[layer]
        weights = [maps[:, query].mean(0), *maps[:, query]]
        mean, *each = [Panel(_grid(row, look), signed) for row in weights]
        rows.append([mean, _rolled_panel(rolled[layer, query], look, query), *each])
    return _draw(picture, look, query, rows, columns, [f"layer {layer}" for layer in layers], title)


def draw_beside(
    picture: Array,
    looks: Sequence[Look],
    rolled: Sequence[Array],
    queries: Sequence[int],
    layers: Sequence[int],
    title: str,
) -> Figure:
    """Draw a row a layer: the mean of the heads of the teacher and of the student, then the rollout of both.

    `looks`, `rolled` and `queries` are the teacher's and the student's.
    """
    columns = ["teacher\nmean", "student\nmean", "teacher\nrollout", "student\nrollout"]
    rows = []
    for layer in layers:
        means = [
            Panel(_grid(look.maps[layer, :, query].mean(0), look), look.signed[layer])
            for look, query in zip(looks, queries, strict=True)
        ]
        rolls = [
            _rolled_panel(each[layer, query], look, query)
            for each, look, query in zip(rolled, looks, queries, strict=True)
        ]
        rows.append([*means, *rolls])
    return _draw(picture, looks[1], queries[1], rows, columns, [f"layer {layer}" for layer in layers], title)


def _grid(row: Any, look: Look) -> Array:
    """Return the patches' part of a row of the map, as the grid."""
    patches: Array = np.asarray(row)[look.layout.num_prefix :].reshape(look.layout.grid)
    return patches


def _rolled_panel(row: Array, look: Look, query: int) -> Panel:
    own = query - look.layout.num_prefix
    return Panel(_grid(row, look), but=own if own >= 0 else None)


def _draw(
    picture: Array,
    look: Look,
    query: int,
    rows: Sequence[Sequence[Panel]],
    columns: Sequence[str],
    names: Sequence[str],
    title: str,
) -> Figure:
    width, height = _panel_size(picture, len(columns) + 1, len(rows))
    signed = any(panel.signed for row in rows for panel in row)
    figure = new_figure(width * (len(columns) + 1) + 0.9 + 0.7 * signed, max(height * len(rows) + 0.8, 2.6))
    grid = figure.subplots(len(rows), len(columns) + 1, squeeze=False)
    for axes, heading in zip(grid[0], ["image", *columns], strict=True):
        axes.set_title(heading, color=INK["light"], fontsize=8)
    for axes, panels, name in zip(grid, rows, names, strict=True):
        _show(axes[0], picture, None, look, query)
        axes[0].set_ylabel(name, color=INK["light"], fontsize=8)
        for each, panel in zip(axes[1:], panels, strict=True):
            _show(each, picture, panel, look, query)
    figure.suptitle(title, color=INK["light"], fontsize=10)
    _color_bar(figure, grid, HEAT, 0, "weight / the number in the panel")
    if signed:
        _color_bar(figure, grid, SIGNED, -1, "the same, where weights may be negative")
    return figure


def _panel_size(picture: Array, columns: int, rows: int) -> tuple[float, float]:
    height, width = picture.shape[:2]
    across, down = INCHES * width / max(height, width), INCHES * height / max(height, width)
    shrink = min(1.0, LARGEST / (across * columns), LARGEST / (down * rows))
    return across * shrink, down * shrink + 0.06


def _show(axes: Any, picture: Array, panel: Panel | None, look: Look, query: int) -> None:
    """Draw the image, the heat over it, its largest weight in the corner; a prefix token has no frame."""
    asking, grid = query - look.layout.num_prefix, look.layout.grid
    place = divmod(asking, grid[1]) if asking >= 0 else None
    if panel is None:
        draw_heat(axes, picture, grid, place)
        return
    draw_heat(axes, picture, grid, place, panel.heat, panel.top or 1, signed=panel.signed)
    label = {"boxstyle": "square,pad=0.15", "facecolor": "#000000b0", "linewidth": 0}
    corner = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
    axes.text(0.985, 0.02, f"{panel.top:.2g}", fontsize=5.5, color="white", bbox=label, **corner)


def _color_bar(figure: Figure, grid: Any, colors: str, low: Literal[-1, 0], label: str) -> None:
    scale = ScalarMappable(Normalize(low, 1), colors)
    bar = figure.colorbar(scale, ax=grid, fraction=0.025, pad=0.01, aspect=24, shrink=0.9)
    bar.set_label(label, color=INK["light"], fontsize=7)
    bar.set_ticks([low, 0, 1] if low else [0, 0.5, 1])
    bar.ax.tick_params(colors=INK["light"], labelsize=7, length=2)
    bar.outline.set_visible(False)


def grid_title(name: str, query: int, look: Look) -> str:
    """Return the title of a query's picture."""
    the = "the " if query < look.layout.num_prefix else ""
    return f"{name}: what {the}{token_name(query, look.layout)} attends to"
