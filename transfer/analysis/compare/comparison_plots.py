"""The plots of a comparison: accuracy against latency and memory, latency against tokens, error by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing

from ..benchmark import Crossover, crossover
from ..report.ink import (
    FAINT,
    GRAY,
    INK,
    SIGNED_LABEL,
    Line,
    Panel,
    Scale,
    Theme,
    clear_axes,
    color_bar,
    color_of,
    dashes_of,
    draw_lines,
    draw_panel,
    draw_picture,
    new_figure,
    new_plots,
    spread,
)
from ..report.rendering import Figure
from .comparison_cells import TEACHER, UNIFORM, Record, Speed
from .student_cell import CellMaps


def figures_of(records: Sequence[Record]) -> list[Figure]:
    """Return the figures that there are numbers for, at the largest image size."""
    size = max((record.size for record in records), default=0)
    here = [record for record in records if record.size == size and record.error is None]
    measured = [record for record in here if record.speed is not None and record.final is not None]
    changed = [record for record in here if record.plan is not None and not record.is_unconverted]
    swept = [record for record in changed if len(record.speeds) > 1]
    compared = [record for record in changed if record.layer_errors]
    return [
        *(_accuracies(measured) if measured else []),
        *([_latency_tokens(swept)] if swept else []),
        *([_errors_layers(compared)] if compared else []),
    ]


def crossover_of(record: Record) -> Crossover | None:
    """Return the number of tokens from which the model is faster than unconverted; None with one size."""
    if len(record.speeds) < 2:
        return None
    ratios = [speed.softmax_latency / speed.latency for speed in record.speeds]
    return crossover([speed.tokens for speed in record.speeds], ratios)


def _accuracies(records: Sequence[Record]) -> list[Figure]:
    start = "Top-1 after the last stage, and"
    about = f"{start} milliseconds for one image of {records[0].size} px. Up and left is better."
    scatter = f"Scatter of {len(records)} models: top-1 against"
    return [
        Figure(
            "accuracy_latency",
            "Accuracy against latency",
            about,
            f"{scatter} milliseconds for one image.",
            partial(_scatter, records, lambda speed: 1e3 * speed.latency, "milliseconds for one image"),
        ),
        Figure(
            "accuracy_memory",
            "Accuracy against memory",
            f"{start} what a batch needs in memory above the weights. Up and left is better.",
            f"{scatter} the peak memory of a batch.",
            partial(_scatter, records, lambda speed: speed.peak_bytes / 2**20, "peak memory of a batch, MiB"),
        ),
    ]


def _latency_tokens(students: Sequence[Record]) -> Figure:
    return Figure(
        "latency_tokens",
        "Latency against the number of tokens",
        "Milliseconds of the whole model for one image. A ring marks the number of tokens from which it is faster "
        "than the same model before its conversion; the legend has it behind the name.",
        f"Log-log lines of {len(students)} models: milliseconds for one image against tokens.",
        partial(_lines_over_tokens, students),
    )


def _errors_layers(records: Sequence[Record]) -> Figure:
    return Figure(
        "layer_errors",
        "Error by layer",
        "Relative error of each layer's output, per head, on the teacher's own inputs: 0 is the teacher's layer. The "
        "stages after alignment train the network for its task, and layers may move away from the teacher's again.",
        f"Lines of {len(records)} students: relative output error by layer, a panel a stage.",
        partial(_error_panels, records),
    )


def _scatter(records: Sequence[Record], value: Callable[[Speed], float], name: str, theme: Theme) -> Drawing:
    """Draw points, each joined to its name at the right edge."""
    figure, (axes,) = new_plots(theme, (8.4, max(3.6, 0.27 * len(records) + 1.2)))
    points = []
    for record in records:
        if record.speed is not None and record.final is not None:
            points.append((value(record.speed), record.final.top1, record))
    for x, y, record in points:
        marker, color = "*" if record.plan is None else "o", color_for(record, records, theme)
        filled = color if record.linear or record.plan is None else "none"
        axes.plot([x], [y], marker, color=color, mfc=filled, markersize=13 if marker == "*" else 7, zorder=3)
    axes.set_xlabel(name)
    axes.set_ylabel("top-1, %")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    _names_at_the_edge(axes, points, records, theme)
    axes.set_title("filled: every layer of linear cost", fontsize=9, color=INK[theme], loc="left")
    return figure


def _names_at_the_edge(
    axes: Any, points: Sequence[tuple[float, float, Record]], records: Sequence[Record], theme: Theme
) -> None:
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: point[1])
    gap = min(0.062, 0.75 / max(1, len(points) - 1))  # a line of text, as a share of the height
    places = spread([(y - low) / (high - low) for _, y, _ in ordered], gap, 0.0, 1.0)
    for (x, y, record), place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{record.name} {y:.1f}",
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=color_for(record, records, theme),
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT[theme], "linewidth": 0.7, "shrinkB": 5},
        )


def _lines_over_tokens(records: Sequence[Record], theme: Theme) -> Drawing:
    tokens = sorted({speed.tokens for record in records for speed in record.speeds})
    softmax = [
        1e3 * float(np.median([s.softmax_latency for r in records for s in r.speeds if s.tokens == count]))
        for count in tokens
    ]
    lines = [Line("unconverted", tokens, softmax, INK[theme], "--")]
    for record in records:
        at = crossover_of(record)
        ring = at.size if at is not None and not at.where else None
        points = [s.tokens for s in record.speeds], [1e3 * s.latency for s in record.speeds]
        style = color_for(record, records, theme), dashes_of(_place(record, records))
        lines.append(Line(f"{record.name} ({at})", *points, *style, ring=ring))
    return draw_lines({"": lines}, theme, ("tokens", "milliseconds for one image"), size=(8.4, 4.8), log=True)


def _error_panels(records: Sequence[Record], theme: Theme) -> Drawing:
    stages = list(dict.fromkeys(stage for record in records for stage in record.layer_errors))
    panels = {
        stage: [
            Line(
                record.name,
                list(errors),
                list(errors.values()),
                color_for(record, records, theme),
                dashes_of(_place(record, records)),
            )
            for record in records
            for errors in [record.layer_errors.get(stage, {})]
        ]
        for stage in stages
    }
    most = max((y for lines in panels.values() for line in lines for y in line.y), default=1.0)
    limits = (0.0, min(1.6, 1.05 * most))
    return draw_lines(panels, theme, ("layer", "relative output error"), limits=limits)


def color_for(record: Record, records: Sequence[Record], theme: Theme) -> str:
    """Return ink for the teacher, grey for uniform attention, a color of its own for each of ten others."""
    if record.name in (TEACHER, UNIFORM):
        return INK[theme] if record.name == TEACHER else GRAY
    return color_of(_place(record, records))


def _place(record: Record, records: Sequence[Record]) -> int:
    names = [each.name for each in records if each.name not in (TEACHER, UNIFORM)]
    return names.index(record.name) if record.name in names else 0


# The attention of all cells side by side: a row a mechanism, on the same images and for the same query.

INCHES = 1.1
"""The longer side of a panel."""
SCALES = 0.7
"""The width of the color bars with their labels, in inches."""
NAMES = 1.4
"""The width of the names of the cells, in inches."""


def map_figure(cells: Mapping[str, CellMaps | None]) -> Figure | None:
    """Return the figure of the cells' maps by name; None where no cell has kept any."""
    known = [each for each in cells.values() if each is not None]
    if not known:
        return None
    images, layers = len(known[0].pictures), known[0].layers
    return Figure(
        "attention",
        "Attention",
        f"What {known[0].query} attends to in {images} test images: the mean of the heads, after the last stage. The "
        "number is the largest weight. The panels of a column share a scale; two colors are of maps with negative "
        "weights. Layers that were converted show the rows of the matrix that their operator applies to the values.",
        f"Attention maps of {len(cells)} models, a row each, in layers {', '.join(map(str, layers))}.",
        partial(draw_maps, cells, known[0]),
    )


def draw_maps(cells: Mapping[str, CellMaps | None], shown: CellMaps, theme: Theme) -> Drawing:
    """Draw a row a cell and a column an image and layer; `shown` gives the images. The first row has the images."""
    columns = [(image, layer) for image in range(len(shown.pictures)) for layer in shown.layers]
    sides = shown.pictures[0].shape[:2]
    height, width = (INCHES * side / max(sides) for side in sides)
    tall, wide = height * (len(cells) + 1) + 0.5, width * len(columns) + NAMES + SCALES
    figure = new_figure(wide, tall)
    figure.set_layout_engine("none")  # arranging hundreds of panels takes minutes
    edges = {"left": NAMES / wide, "right": 1 - SCALES / wide, "top": 1 - 0.4 / tall, "bottom": 0.02 / tall}
    spacing = {**edges, "wspace": 0.06, "hspace": 0.06}
    grid = figure.subplots(len(cells) + 1, len(columns), squeeze=False, gridspec_kw=spacing)
    fill_maps(grid, cells, shown, columns, theme)
    _draw_scales(figure, [found for kept in cells.values() if kept for found in kept.maps.values()], wide)
    return figure


def fill_maps(
    grid: Any,
    cells: Mapping[str, CellMaps | None],
    shown: CellMaps,
    columns: Sequence[tuple[int, int]],
    theme: Theme,
) -> None:
    """Fill the first row of plots with images, and one for each cell with its maps at these images and layers."""
    for axes, (image, layer) in zip(grid[0], columns, strict=True):
        own = shown.maps[image, layer]
        draw_picture(axes, shown.pictures[image], own.grid, own.asking)
        axes.set_title(f"image {image + 1}\nlayer {layer}", color=INK[theme], fontsize=7)
    for row, (name, kept) in zip(grid[1:], cells.items(), strict=True):
        missing = "no map" if kept is None else "no attention"
        for axes, column in zip(row, columns, strict=True):
            found = None if kept is None else kept.maps.get(column)
            if found is None or not found.heat.size:
                clear_axes(axes)
                axes.text(0.5, 0.5, missing, ha="center", va="center", color=INK[theme], fontsize=6.5)
            else:
                top = max(each.top for each in _beside(cells, column)) or 1
                draw_panel(axes, shown.pictures[column[0]], found, Scale(top, found.signed))
        row[0].set_ylabel(name, color=INK[theme], fontsize=8, rotation=0, ha="right", va="center")


def _beside(cells: Mapping[str, CellMaps | None], column: tuple[int, int]) -> list[Panel]:
    """Return the panels of a column: the same layer of all cells, on the same image, is compared."""
    return [kept.maps[column] for kept in cells.values() if kept is not None and column in kept.maps]


def _draw_scales(figure: Drawing, found: Sequence[Panel], wide: float) -> None:
    """Draw the color bars beside the panels."""
    signed = any(each.signed for each in found)
    label = "weight / the largest number of the column"
    for each, (bottom, tall) in zip((False, True), ((0.52, 0.4), (0.06, 0.4)), strict=True):
        if signed or not each:
            place = figure.add_axes((1 - (SCALES - 0.1) / wide, bottom, 0.1 / wide, tall))
            color_bar(figure, SIGNED_LABEL if each else label, Scale(1, each), cax=place)
