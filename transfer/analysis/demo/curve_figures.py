"""The demo's line charts: learning curves, and divergence by layer, a panel for each teacher.

Each is drawn on a transparent ground, once in ink for light pages and once for dark ones.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.isotonic import isotonic_regression

Theme = Literal["light", "dark"]
Array = NDArray[Any]
INK: dict[Theme, str] = {"light": "#24292f", "dark": "#dfe3e8"}
FAINT: dict[Theme, str] = {"light": "#d4d9df", "dark": "#3a414b"}
COLOURS = {
    "scratch": "#8b949e",
    "finetune": "#3b82d6",
    "copy": "#e08a1e",
    "distill": "#12a07a",
    "ensemble": "#9a63d8",
}


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
    """Test accuracy along training: the mean over seeds, a band of one deviation, the name at the end."""
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
    """Jensen-Shannon divergence from the teacher's maps, by layer; zero is the teacher itself."""
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


def to_png(figure: Figure, *, ground: str = "none", dots_per_inch: int = 170) -> bytes:
    """The figure as a PNG file, on a transparent `ground` or a colour."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dots_per_inch, facecolor=ground)
    return file.getvalue()


def _grid(theme: Theme, panels: Sequence[Panel], height: float) -> tuple[Figure, list[Any]]:
    """A plot for each panel, side by side on one scale."""
    figure = Figure(figsize=(9.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(panel.title, color=INK[theme], fontsize=10, loc="left")
        axes.set_facecolor("none")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT[theme])
        axes.grid(axis="y", color=FAINT[theme], linewidth=0.7)
        axes.tick_params(colors=INK[theme], length=0, labelsize=9)
        axes.xaxis.label.set_color(INK[theme])
        axes.yaxis.label.set_color(INK[theme])
    return figure, grid


def _line(axes: Any, curve: Curve, marker: str = "") -> None:
    mean, spread = curve.values.mean(axis=0), _deviation(curve.values)
    colour = COLOURS[curve.method]
    axes.fill_between(curve.axis, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.axis, mean, color=colour, linewidth=2, marker=marker, markersize=5)


def _deviation(values: Array) -> Array:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def _end_labels(grid: Sequence[Any], panels: Sequence[Panel]) -> None:
    """Names at the right ends of the lines, as near to them as they can be without touching each other."""
    low, high = grid[0].get_ylim()
    gap = (high - low) * 0.075
    for axes, panel in zip(grid, panels, strict=True):
        ordered = sorted(panel.curves, key=lambda curve: float(curve.values[:, -1].mean()))
        ends = np.array([float(curve.values[:, -1].mean()) for curve in ordered])
        room = gap * np.arange(len(ordered))
        places = isotonic_regression(ends - room) + room  # the least-squares places that are a gap apart
        for curve, place in zip(ordered, places, strict=True):
            axes.annotate(
                curve.label,
                (1.01, place),
                xycoords=("axes fraction", "data"),
                color=COLOURS[curve.method],
                va="center",
                fontsize=10,
                fontweight="bold",
            )
