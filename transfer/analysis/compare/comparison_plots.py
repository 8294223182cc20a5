"""The plots of a comparison: accuracy against latency and memory, latency against tokens, error by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..benchmark.crossover import Crossover, crossover
from ..report.ink import (
    FAINT,
    GRAY,
    INK,
    Theme,
    color_of,
    dashes_of,
    draw_ring,
    legend_beside,
    log_log,
    new_plots,
    spread,
)
from ..report.pages import Plot
from .cell_record import Record, Speed
from .comparison_cells import TEACHER, UNIFORM


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
