"""Latency against the number of tokens, or the image side: log-log, with the crossovers marked."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .cases import SOFTMAX, Case, Row
from .crossover import crossovers, without_size

INK = "#24292f"
GRID = "#d4d9df"


def draw_latency(rows: Sequence[Row]) -> Figure:
    """One panel a setting: a line an operator, softmax dashed, a ring where a line crosses it for good."""
    panels: dict[Case, list[Row]] = {}
    for row in rows:
        panels.setdefault(_panel(row.case), []).append(row)
    figure = Figure(figsize=(8.4, 5.0 * max(1, len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, len(panels)), 1, squeeze=False)
    for axes, (panel, group) in zip(grid[:, 0], panels.items(), strict=False):
        _draw_panel(axes, panel, group)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file.getvalue()


def _panel(case: Case) -> Case:
    """What all lines of a panel share."""
    return Case(
        case.kind, "", case.source, 0, case.batch, case.dtype, case.device, case.backward, case.compiled
    )


def _draw_panel(axes: Any, panel: Case, rows: list[Row]) -> None:
    found = crossovers(rows)
    _draw_softmax(axes, rows)
    for number, name in enumerate(dict.fromkeys(row.case.name for row in rows)):
        if name == SOFTMAX:
            continue
        line = sorted((row for row in rows if row.case.name == name), key=lambda row: row.case.size)
        colour = f"C{number % 10}"
        style = ("-", "-.", ":")[number // 10 % 3]
        sizes, medians = [row.case.size for row in line], [1e3 * row.median for row in line]
        at = found.get(without_size(line[0].case))
        label = name if at is None else f"{name} ({at})"
        axes.plot(sizes, medians, style, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        axes.fill_between(
            sizes, [1e3 * row.low for row in line], [1e3 * row.high for row in line], color=colour, alpha=0.15
        )
        if at is not None and not at.where:
            axes.plot(
                [at.size], [_between(sizes, medians, at.size)], "o", mfc="none", mec=colour, markersize=11
            )
    axes.set(xscale="log", yscale="log", ylabel="milliseconds")
    axes.set_xlabel("tokens N" if panel.kind == "operators" else "image side, pixels")
    sizes = sorted({row.case.size for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    mode = "forward and backward" if panel.backward else "forward"
    title = f"{panel.source}, batch {panel.batch}, {panel.dtype}, {panel.device}, {mode}"
    axes.set_title(title + (", compiled" if panel.compiled else ""), color=INK, fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_softmax(axes: Any, rows: list[Row]) -> None:
    """The median over the pairs that were timed at each size."""
    sizes = sorted({row.case.size for row in rows})
    medians = []
    for size in sizes:
        values = sorted(row.softmax for row in rows if row.case.size == size)
        medians.append(1e3 * values[len(values) // 2])
    axes.plot(sizes, medians, "--", color=INK, linewidth=2, label="softmax, fused")


def _between(sizes: Sequence[int], values: Sequence[float], size: float) -> float:
    """The value at a size in between, on a straight line of the log-log plot."""
    for index in range(len(sizes) - 1):
        if sizes[index] <= size <= sizes[index + 1]:
            part = math.log(size / sizes[index]) / math.log(sizes[index + 1] / sizes[index])
            return float(values[index] * (values[index + 1] / values[index]) ** part)
    return float(values[-1])
