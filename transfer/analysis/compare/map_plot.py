"""The attention of all cells side by side: a row a mechanism, on the same images and for the same query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ..report.heat import draw_heat
from ..report.ink import INK, Theme, new_figure
from ..report.pages import Plot
from ..visualize.map_figures import SIGNED_LABEL, color_bar, write_corner
from .cell_maps import CellMap, CellMaps

INCHES = 1.1
"""The longer side of a panel."""
SCALES = 0.7
"""The width of the color bars with their labels, in inches."""
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
        "number is the largest weight. The panels of a column share a scale; two colors are of maps with negative "
        "weights. Layers that were converted show the rows of the matrix that their operator applies to the values.",
        f"Attention maps of {len(cells)} models, a row each, in layers {', '.join(map(str, layers))}.",
        partial(draw_maps, cells, known[0]),
    )


def draw_maps(cells: Mapping[str, CellMaps | None], shown: CellMaps, theme: Theme) -> Figure:
    """Draw a row a cell and a column an image and layer; `shown` gives the images. The first row has the images."""
    columns = [(image, layer) for image in range(len(shown.pictures)) for layer in shown.layers]
    tops = {column: _top(cells, column) for column in columns}
    sides = shown.pictures[0].shape[:2]
    height, width = (INCHES * side / max(sides) for side in sides)
    tall, wide = height * (len(cells) + 1) + 0.5, width * len(columns) + NAMES + SCALES
    figure = new_figure(wide, tall)
    figure.set_layout_engine("none")  # arranging hundreds of panels takes minutes
    edges = {"left": NAMES / wide, "right": 1 - SCALES / wide, "top": 1 - 0.4 / tall, "bottom": 0.02 / tall}
    spacing = {**edges, "wspace": 0.06, "hspace": 0.06}
    grid = figure.subplots(len(cells) + 1, len(columns), squeeze=False, gridspec_kw=spacing)
    for axes, (image, layer) in zip(grid[0], columns, strict=True):
        own = shown.maps[image, layer]
        draw_heat(axes, shown.pictures[image], own.grid, own.asking)
        axes.set_title(f"image {image + 1}\nlayer {layer}", color=INK[theme], fontsize=7)
    for row, kept in zip(grid[1:], cells.values(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            found = None if kept is None else kept.maps.get(column)
            _draw_cell(
                axes, shown, column, found, tops[column], "no map" if kept is None else "no attention", theme
            )
    _draw_scales(figure, [found for kept in cells.values() if kept for found in kept.maps.values()], wide)
    for row, name in zip(grid, ["", *cells], strict=True):
        box = row[0].get_position()
        middle = (box.y0 + box.y1) / 2
        figure.text(
            (NAMES - 0.08) / wide, middle, name, ha="right", va="center", color=INK[theme], fontsize=8
        )
    return figure


def _top(cells: Mapping[str, CellMaps | None], column: tuple[int, int]) -> float:
    """Return the largest weight of a column: the same layer of all cells, on the same image, is compared."""
    found = [kept.maps[column].heat for kept in cells.values() if kept is not None and column in kept.maps]
    return max((float(abs(heat).max()) for heat in found if heat.size), default=0) or 1


def _draw_scales(figure: Figure, found: Sequence[CellMap], wide: float) -> None:
    """Draw the color bars beside the panels."""
    signed = any(_is_signed(each) for each in found)
    label = "weight / the largest number of the column"
    for each, (bottom, tall) in zip((False, True), ((0.52, 0.4), (0.06, 0.4)), strict=True):
        if signed or not each:
            place = figure.add_axes((1 - (SCALES - 0.1) / wide, bottom, 0.1 / wide, tall))
            color_bar(figure, SIGNED_LABEL if each else label, signed=each, cax=place)


def _is_signed(found: CellMap) -> bool:
    return bool((found.heat < 0).any())


def _draw_cell(
    axes: Any,
    shown: CellMaps,
    column: tuple[int, int],
    found: CellMap | None,
    top: float,
    missing: str,
    theme: Theme,
) -> None:
    """Draw a map over its image, or say what is missing."""
    if found is None or not found.heat.size:
        axes.set_axis_off()
        axes.text(0.5, 0.5, missing, ha="center", va="center", color=INK[theme], fontsize=6.5)
        return
    picture, signed = shown.pictures[column[0]], _is_signed(found)
    draw_heat(axes, picture, found.grid, found.asking, found.heat, top, signed=signed, covers=found.extent)
    write_corner(axes, f"{float(abs(found.heat).max()):.2g}")
