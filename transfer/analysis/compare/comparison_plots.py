"""The plots of a comparison: accuracy against latency and memory, latency against tokens, error by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..benchmark.benchmark import Crossover, crossover
from ..report.ink import (
    FAINT,
    GRAY,
    INK,
    Theme,
    color_of,
    dashes_of,
    draw_heat,
    draw_ring,
    legend_beside,
    log_log,
    new_figure,
    new_plots,
    spread,
)
from ..report.pages import Plot
from ..visualize.map_figures import SIGNED_LABEL, color_bar, write_corner
from .comparison_cells import TEACHER, UNIFORM, Record, Speed
from .student_cell import CellMap, CellMaps


def plots_of(records: Sequence[Record]) -> list[Plot]:
    """Return the plots that there are numbers for, at the largest image size."""
    size = max((record.size for record in records), default=0)
    here = [record for record in records if record.size == size and record.error is None]
    measured = [record for record in here if record.speed is not None and record.final is not None]
    plots = []
    if measured:
        plots += _accuracies(measured)
    changed = [record for record in here if record.plan is not None and not record.is_unconverted]
    swept = [record for record in changed if len(record.speeds) > 1]
    if swept:
        plots.append(_latency_tokens(swept))
    compared = [record for record in changed if record.layer_errors]
    if compared:
        plots.append(_errors_layers(compared))
    return plots


def crossover_of(record: Record) -> Crossover | None:
    """Return the number of tokens from which the model is faster than unconverted; None with one size."""
    if len(record.speeds) < 2:
        return None
    ratios = [speed.softmax_latency / speed.latency for speed in record.speeds]
    return crossover([speed.tokens for speed in record.speeds], ratios)


def _latency(speed: Speed) -> float:
    return 1e3 * speed.latency


def _memory(speed: Speed) -> float:
    return speed.peak_bytes / 2**20


def _accuracies(records: Sequence[Record]) -> list[Plot]:
    start = "Top-1 after the last stage, and"
    about = f"{start} milliseconds for one image of {records[0].size} px. Up and left is better."
    scatter = f"Scatter of {len(records)} models: top-1 against"
    return [
        Plot(
            "accuracy_latency",
            "Accuracy against latency",
            about,
            f"{scatter} milliseconds for one image.",
            partial(_scatter, records, _latency, "milliseconds for one image"),
        ),
        Plot(
            "accuracy_memory",
            "Accuracy against memory",
            f"{start} what a batch needs in memory above the weights. Up and left is better.",
            f"{scatter} the peak memory of a batch.",
            partial(_scatter, records, _memory, "peak memory of a batch, MiB"),
        ),
    ]


def _latency_tokens(students: Sequence[Record]) -> Plot:
    return Plot(
        "latency_tokens",
        "Latency against the number of tokens",
        "Milliseconds of the whole model for one image. A ring marks the number of tokens from which it is faster "
        "than the same model before its conversion; the legend has it behind the name.",
        f"Log-log lines of {len(students)} models: milliseconds for one image against tokens.",
        partial(_lines_over_tokens, students),
    )


def _errors_layers(records: Sequence[Record]) -> Plot:
    return Plot(
        "layer_errors",
        "Error by layer",
        "Relative error of each layer's output, per head, on the teacher's own inputs: 0 is the teacher's layer. The "
        "stages after alignment train the network for its task, and layers may move away from the teacher's again.",
        f"Lines of {len(records)} students: relative output error by layer, a panel a stage.",
        partial(_error_panels, records),
    )


def _scatter(records: Sequence[Record], value: Callable[[Speed], float], name: str, theme: Theme) -> Figure:
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


def _lines_over_tokens(records: Sequence[Record], theme: Theme) -> Figure:
    figure, (axes,) = new_plots(theme, (8.4, 4.8))
    tokens = sorted({speed.tokens for record in records for speed in record.speeds})
    softmax = [
        float(np.median([s.softmax_latency for r in records for s in r.speeds if s.tokens == count]))
        for count in tokens
    ]
    axes.plot(tokens, [1e3 * x for x in softmax], "--", color=INK[theme], linewidth=2.2, label="unconverted")
    for record in records:
        at = crossover_of(record)
        x, y = [s.tokens for s in record.speeds], [1e3 * s.latency for s in record.speeds]
        color, style = color_for(record, records, theme), dashes_of(_place(record, records))
        axes.plot(
            x, y, style, color=color, linewidth=1.4, marker="o", markersize=3, label=f"{record.name} ({at})"
        )
        if at is not None and not at.where:
            draw_ring(axes, at.size, x, y, color)
    log_log(axes, tokens)
    axes.set(xlabel="tokens", ylabel="milliseconds for one image")
    legend_beside(axes, theme)
    return figure


def _error_panels(records: Sequence[Record], theme: Theme) -> Figure:
    stages = list(dict.fromkeys(stage for record in records for stage in record.layer_errors))
    figure, panels = new_plots(theme, (8.4, 4.2), columns=len(stages), sharey=True)
    for axes, stage in zip(panels, stages, strict=True):
        for record in records:
            errors = record.layer_errors.get(stage, {})
            color, style = color_for(record, records, theme), dashes_of(_place(record, records))
            axes.plot(list(errors), list(errors.values()), style, color=color, marker="o", markersize=3,
                      linewidth=1.4, label=record.name)  # fmt: skip
        axes.set_title(stage, fontsize=10, color=INK[theme])
        axes.set_xlabel("layer")
        axes.set_xticks(
            sorted({layer for record in records for by in record.layer_errors.values() for layer in by})
        )
    panels[0].set_ylabel("relative output error")
    panels[0].set_ylim(bottom=0.0, top=min(1.6, panels[0].get_ylim()[1]))
    legend_beside(panels[-1], theme)
    return figure


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
