"""The attention of all cells side by side: a row a mechanism, on the same images and for the same query."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ..report.heat import draw_heat
from ..report.ink import INK, Theme, new_figure
from ..report.pages import Plot
from ..visualize.map_figures import Panel, Row, show_panel
from .cell_maps import CellMap, CellMaps

INCHES = 1.1
"""The longer side of a panel."""
NAMES = 1.4
"""The width of the names of the cells, in inches."""


def map_plot(cells: Mapping[str, CellMaps | None]) -> Plot | None:
    """Return the plot of the cells' maps by name; None where no cell has kept any."""
    known = [each for each in cells.values() if each is not None]
    if not known:
        return None
    images, layers = len(known[0].pictures), known[0].layers
    return Plot(
        "attention",
        "Attention",
        f"What {known[0].query} attends to in {images} test images: the mean of the heads, after the last stage. The "
        "number is the weight with the strongest color; two colors are of maps with negative weights. Layers that were "
        "converted show the rows of the matrix that their operator applies to the values.",
        f"Attention maps of {len(cells)} models, a row each, in layers {', '.join(map(str, layers))}.",
        partial(draw_maps, cells, known[0]),
    )


def draw_maps(cells: Mapping[str, CellMaps | None], shown: CellMaps, theme: Theme) -> Figure:
    """Draw a row a cell and a column an image and layer; `shown` gives the images. The first row has the images."""
    columns = [(image, layer) for image in range(len(shown.pictures)) for layer in shown.layers]
    sides = shown.pictures[0].shape[:2]
    height, width = (INCHES * side / max(sides) for side in sides)
    tall, wide = height * (len(cells) + 1) + 0.5, width * len(columns) + NAMES
    figure = new_figure(wide, tall)
    figure.set_layout_engine("none")  # arranging hundreds of panels takes minutes
    edges = {"left": NAMES / wide, "right": 0.99, "top": 1 - 0.4 / tall, "bottom": 0.02 / tall}
    spacing = {**edges, "wspace": 0.06, "hspace": 0.06}
    grid = figure.subplots(len(cells) + 1, len(columns), squeeze=False, gridspec_kw=spacing)
    for axes, (image, layer) in zip(grid[0], columns, strict=True):
        own = shown.maps[image, layer]
        draw_heat(axes, shown.pictures[image], own.grid, own.asking)
        axes.set_title(f"image {image + 1}\nlayer {layer}", color=INK[theme], fontsize=7)
    for row, kept in zip(grid[1:], cells.values(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            found = None if kept is None else kept.maps.get(column)
            _draw_cell(axes, shown, column, found, "no map" if kept is None else "no attention", theme)
    for row, name in zip(grid, ["", *cells], strict=True):
        box = row[0].get_position()
        middle = (box.y0 + box.y1) / 2
        figure.text(
            (NAMES - 0.08) / wide, middle, name, ha="right", va="center", color=INK[theme], fontsize=8
        )
    return figure


def _draw_cell(
    axes: Any, shown: CellMaps, column: tuple[int, int], found: CellMap | None, missing: str, theme: Theme
) -> None:
    """Draw a map over its image, or say what is missing."""
    if found is None or not found.heat.size:
        axes.set_axis_off()
        axes.text(0.5, 0.5, missing, ha="center", va="center", color=INK[theme], fontsize=6.5)
        return
    panel = Panel(found.heat, bool((found.heat < 0).any()), extent=found.extent)
    show_panel(axes, shown.pictures[column[0]], panel, Row("", found.grid, found.asking, [panel]))
