"""The demo's line charts: learning curves, and divergence by layer, a panel for each teacher.

Each is drawn on a transparent ground, once in ink for light pages and once for dark ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..report.ink import BLUE, GRAY, GREEN, INK, ORANGE, PURPLE, Array, Theme, new_plots, spread

COLORS = {"scratch": GRAY, "finetune": BLUE, "copy": ORANGE, "distill": GREEN, "ensemble": PURPLE}


@dataclass(frozen=True)
class Curve:
    """A number of one method along an axis, one row a seed: `values` is (seeds, len(axis))."""

    method: str
    label: str
    axis: Sequence[float]
    values: Array


@dataclass(frozen=True)
class Panel:
    """The curves that belong together, with a line that says why."""

    title: str
    curves: Sequence[Curve]


def draw_curves(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Draw test accuracy along training: the mean over seeds, a band of one deviation, the name at the end."""
    figure, grid = _grid(theme, panels, 3.9)
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel.curves:
            _line(axes, curve)
        axes.set_xlabel("training step")
    grid[0].set_ylabel("top-1 on the test images, %")
    lowest_end = min(float(curve.values[:, -1].min()) for panel in panels for curve in panel.curves)
    # the first steps are alike and say little
    grid[0].set_ylim(bottom=max(grid[0].get_ylim()[0], lowest_end - 30))
    _end_labels(grid, panels)
    return figure


def draw_divergence(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Draw the Jensen-Shannon divergence from the teacher's maps, by layer; zero is the teacher itself."""
    figure, grid = _grid(theme, panels, 3.2)
    for axes, panel in zip(grid, panels, strict=True):
        for curve in panel.curves:
            _line(axes, curve, marker="o")
        axes.set_xlabel("layer")
        axes.set_xticks(list(panel.curves[0].axis))
    grid[0].set_ylabel("divergence, nats")
    grid[0].set_ylim(bottom=0.0)
    _end_labels(grid, panels)
    return figure


def _grid(theme: Theme, panels: Sequence[Panel], height: float) -> tuple[Figure, list[Any]]:
    """Return a plot for each panel, side by side on one scale."""
    figure, grid = new_plots(theme, (9.2, height), columns=len(panels), grid="y", sharey=True)
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(panel.title, color=INK[theme], fontsize=10, loc="left")
    return figure, grid


def _line(axes: Any, curve: Curve, marker: str = "") -> None:
    mean, spread = curve.values.mean(axis=0), _deviation(curve.values)
    color = COLORS[curve.method]
    axes.fill_between(curve.axis, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    axes.plot(curve.axis, mean, color=color, linewidth=2, marker=marker, markersize=5)


def _deviation(values: Array) -> Array:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def _end_labels(grid: Sequence[Any], panels: Sequence[Panel]) -> None:
    """Put names at the right ends of the lines, as near as they can be without touching each other."""
    low, high = grid[0].get_ylim()
    gap = (high - low) * 0.075
    for axes, panel in zip(grid, panels, strict=True):
        ordered = sorted(panel.curves, key=lambda curve: float(curve.values[:, -1].mean()))
        places = spread([float(curve.values[:, -1].mean()) for curve in ordered], gap)
        for curve, place in zip(ordered, places, strict=True):
            axes.annotate(
                curve.label,
                (1.01, place),
                xycoords=("axes fraction", "data"),
                color=COLORS[curve.method],
                va="center",
                fontsize=10,
                fontweight="bold",
            )
