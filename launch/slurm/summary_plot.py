"""Plot a sweep: a point for each setting with its deviation over seeds; lines over a swept number."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .summary import ACCURACIES, Measure, Row, Summary

INK, FAINT = "#24292f", "#d4d9df"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colors of Okabe and Ito (2008), distinct with every kind of color vision; the yellow is too pale for lines."""
MARKERS = "osD^vP"
LOG_FROM = 20.0
"""The axis is logarithmic if the largest value is at least this many times the smallest."""


def to_png(summary: Summary) -> bytes:
    """Return the plot as a PNG file. At least one cell must be done."""
    file = io.BytesIO()
    draw(summary).savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def draw(summary: Summary) -> Figure:
    """Return the first available of: the last accuracy of the average, of the student, or the loss."""
    name = next(name for name in (*ACCURACIES[::-1], "train_loss") if name in summary.names)
    rows = [row for row in summary.rows if name in row.measures]
    key = numeric_key(summary)
    lines = {} if key is None else _lines(rows, key)
    if key is None or len(lines) > len(COLORS):
        return _points(rows, name)
    return _over_number(lines, key, name)


def numeric_key(summary: Summary) -> str | None:
    """Return the one setting whose values are all numbers; None if there is not exactly one."""
    found = [
        key for key in summary.keys if all(_number(row.settings[key]) is not None for row in summary.rows)
    ]
    several = [key for key in found if len({row.settings[key] for row in summary.rows}) > 1]
    return several[0] if len(several) == 1 else None


def _lines(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Group the rows by all other settings, and order each group by the number."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row.settings[key])):
        lines.setdefault(_label(row, without=key), []).append(row)
    return lines


def _over_number(lines: dict[str, list[Row]], key: str, name: str) -> Figure:
    figure, axes = _figure(8.0, 4.6)
    everything = [float(row.settings[key]) for rows in lines.values() for row in rows]
    for place, (label, rows) in enumerate(lines.items()):
        x = [float(row.settings[key]) for row in rows]
        measures = [row.measures[name] for row in rows]
        style = {"color": COLORS[place], "marker": MARKERS[place], "label": label or None}
        axes.errorbar(x, [m.mean for m in measures], yerr=_errors(measures), capsize=3, markersize=5, **style)
    if min(everything) > 0 and max(everything) / min(everything) >= LOG_FROM:
        axes.set_xscale("log")
    ticks = sorted(set(everything))
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(key)
    axes.set_ylabel(_words(name, [row for rows in lines.values() for row in rows]))
    if any(lines):
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)
    return figure


def _points(rows: Sequence[Row], name: str) -> Figure:
    """Draw a line of text for each setting, with its mean and deviation, and its seeds as small marks."""
    figure, axes = _figure(8.0, max(2.0, 0.32 * len(rows) + 1.0))
    for place, row in enumerate(rows):
        measure = row.measures[name]
        axes.plot(measure.values, [place] * len(measure.values), "|", color=COLORS[4], markersize=9, zorder=2)
        axes.errorbar([measure.mean], [place], xerr=_errors([measure]), fmt="o", color=COLORS[0],
                      capsize=3, markersize=6, zorder=3)  # fmt: skip
    axes.set_yticks(range(len(rows)), [_label(row) or "as in the recipe" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(_words(name, rows))
    return figure


def _errors(measures: Sequence[Measure]) -> list[float]:
    """Nothing is drawn where there is no deviation."""
    return [math.nan if measure.std is None else measure.std for measure in measures]


def _label(row: Row, without: str = "") -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]}={_short(value)}" for key, value in row.settings.items() if key != without
    )


def _short(value: str, length: int = 40) -> str:
    # matplotlib would read a text between dollar signs as a formula
    return (value if len(value) <= length else f"{value[: length - 1]}…").replace("$", r"\$")


def _words(name: str, rows: Sequence[Row]) -> str:
    words = {"test_top1": "top-1, %", "test_ema_top1": "top-1 of the average, %"}
    several = any(row.measures[name].std is not None for row in rows)
    return words.get(name, "training loss") + " (mean ± standard deviation over seeds)" * several


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    return figure, axes
