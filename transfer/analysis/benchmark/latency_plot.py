"""Latency against the number of tokens, or the image side: log-log, with the crossovers marked."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..report.ink import INK, color_of, dashes_of, draw_ring, legend_beside, log_log, new_plots
from .cases import SOFTMAX, Row
from .crossover import crossovers, without_size


def draw_latency(rows: Sequence[Row]) -> Figure:
    """Draw one plot a setting: a line an operator, softmax dashed, a ring where a line crosses it for good."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.case.setting, []).append(row)
    count = max(1, len(panels))
    figure, plots = new_plots("light", (8.4, 5.0 * count), rows=count)
    for axes, (setting, group) in zip(plots, panels.items(), strict=False):
        _draw_panel(axes, setting, group)
    return figure


def _draw_panel(axes: Any, setting: str, rows: list[Row]) -> None:
    found, sizes = crossovers(rows), sorted({row.case.size for row in rows})
    softmax = [statistics.median_high(row.softmax for row in rows if row.case.size == size) for size in sizes]
    axes.plot(
        sizes,
        [1e3 * value for value in softmax],
        "--",
        color=INK["light"],
        linewidth=2,
        label=rows[0].case.beside,
    )
    names = [name for name in dict.fromkeys(row.case.name for row in rows) if name != SOFTMAX]
    for place, name in enumerate(names):
        line = sorted((row for row in rows if row.case.name == name), key=lambda row: row.case.size)
        x = [row.case.size for row in line]
        low, y, high = ([1e3 * getattr(row, key) for row in line] for key in ("low", "median", "high"))
        at, color = found.get(without_size(line[0].case)), color_of(place)
        label = name if at is None else f"{name} ({at})"
        axes.plot(x, y, dashes_of(place), color=color, marker="o", markersize=3, linewidth=1.4, label=label)
        axes.fill_between(x, low, high, color=color, alpha=0.15)
        if at is not None and not at.where:
            draw_ring(axes, at.size, x, y, color)
    log_log(axes, sizes)
    axes.set_xlabel("tokens N" if rows[0].case.kind == "operators" else "image side, pixels")
    axes.set_ylabel("milliseconds")
    axes.set_title(setting, color=INK["light"], fontsize=10)
    legend_beside(axes, "light")
