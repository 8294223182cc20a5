"""The demo's pictures: learning curves, divergence by layer, and attention maps beside each other.

Each is drawn on a transparent ground, once in ink for light pages and once for dark ones.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
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
class Gaze:
    """One image, the patch that asks, and where it looks in each model, as (rows, columns) maps."""

    image: Array
    query: tuple[int, int]
    layer: str
    maps: Mapping[str, Array]


def draw_curves(curves: Sequence[Curve], theme: Theme) -> Figure:
    """Test accuracy along training: the mean over seeds, a band of one deviation, the name at the end."""
    figure, axes = _axes(theme, (8.4, 4.0))
    for curve in curves:
        _line(axes, curve)
    axes.set_xlabel("training step")
    axes.set_ylabel("top-1 on the test images, %")
    lowest_end = min(float(curve.values[:, -1].min()) for curve in curves)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest_end - 35))  # the first steps are alike and say little
    _end_labels(axes, curves)
    return figure


def draw_divergence(curves: Sequence[Curve], theme: Theme) -> Figure:
    """Jensen-Shannon divergence from the teacher's maps, by layer; zero is the teacher itself."""
    figure, axes = _axes(theme, (8.4, 3.2))
    for curve in curves:
        _line(axes, curve, marker="o")
    axes.set_xlabel("layer")
    axes.set_ylabel("divergence from the teacher, nats")
    axes.set_xticks(list(curves[0].axis))
    axes.set_ylim(bottom=0.0)
    _end_labels(axes, curves)
    return figure


def draw_gazes(gazes: Sequence[Gaze], titles: Mapping[str, str], theme: Theme) -> Figure:
    """A row for each image and layer: the image with its asking patch, then each model's attention over it.

    Within a row all maps share one scale, so that the same shade is the same attention.
    """
    columns = list(titles)
    figure = Figure(figsize=(1.55 * (1 + len(columns)), 1.5 * len(gazes) + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(gazes), 1 + len(columns), squeeze=False)
    for row, gaze in enumerate(gazes):
        top = max(float(gaze.maps[name].max()) for name in columns)
        _show(grid[row, 0], gaze, None, top)
        grid[row, 0].set_ylabel(gaze.layer, color=INK[theme], fontsize=9)
        for axes, name in zip(grid[row, 1:], columns, strict=True):
            _show(axes, gaze, gaze.maps[name], top)
    for axes, title in zip(grid[0], ["image", *titles.values()], strict=True):
        axes.set_title(title, color=INK[theme], fontsize=10)
    return figure


def to_png(figure: Figure, *, ground: str = "none", dots_per_inch: int = 170) -> bytes:
    """The figure as a PNG file, on a transparent `ground` or a colour."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dots_per_inch, facecolor=ground)
    return file.getvalue()


def _axes(theme: Theme, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT[theme])
    axes.grid(axis="y", color=FAINT[theme], linewidth=0.7)
    axes.tick_params(colors=INK[theme], length=0, labelsize=9)
    axes.xaxis.label.set_color(INK[theme])
    axes.yaxis.label.set_color(INK[theme])
    return figure, axes


def _line(axes: Any, curve: Curve, marker: str = "") -> None:
    mean, spread = curve.values.mean(axis=0), _deviation(curve.values)
    colour = COLOURS[curve.method]
    axes.fill_between(curve.axis, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.axis, mean, color=colour, linewidth=2, marker=marker, markersize=5)


def _deviation(values: Array) -> Array:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def _end_labels(axes: Any, curves: Sequence[Curve]) -> None:
    """Names at the right ends of the lines, as near to them as they can be without touching each other."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.075
    ordered = sorted(curves, key=lambda curve: float(curve.values[:, -1].mean()))
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


def _show(axes: Any, gaze: Gaze, heat: Array | None, top: float) -> None:
    """The image, the heat over it where there is one, and a square around the asking patch."""
    height, width = gaze.image.shape[:2]
    frame = (0, width, height, 0)
    axes.imshow(gaze.image, cmap="gray", extent=frame, interpolation="nearest")
    if heat is not None:
        axes.imshow(heat, cmap="magma", vmin=0, vmax=top, extent=frame, alpha=0.8, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    rows, columns = next(iter(gaze.maps.values())).shape
    _mark(axes, gaze.query, height / rows, width / columns)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _mark(axes: Any, query: tuple[int, int], height: float, width: float) -> None:
    row, column = query
    x, y = column * width, row * height
    axes.plot(
        [x, x + width, x + width, x, x], [y, y, y + height, y + height, y], color="#4cc9f0", linewidth=1.8
    )
