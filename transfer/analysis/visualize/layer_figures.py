"""Charts by layer: entropy and distance of every head, and how far a student is from its teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.ink import BLUE, GREEN, INK, ORANGE, Array, Theme, new_plots

STUDENT, TEACHER, BETWEEN = ORANGE, BLUE, GREEN


@dataclass(frozen=True)
class Numbers:
    """By layer and head (L, H), means over images; `tokens` is what the largest entropy follows from."""

    entropy: Array
    distance: Array
    tokens: int


@dataclass(frozen=True)
class MapDistance:
    """By layer: Jensen-Shannon divergence of the maps in nats, linear CKA of the patch tokens."""

    js: Sequence[float]
    cka: Sequence[float]


def draw_layers(models: dict[str, Numbers], between: MapDistance | None, theme: Theme) -> Figure:
    """Draw entropy and mean distance, a dot a head and a line their mean; with a teacher, JS and CKA too."""
    rows = 1 if between is None else 2
    figure, grid = new_plots(theme, (9.6, 3.0 * rows), rows, 2, grid="y")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    entropy, distance = grid[:2]
    for name, numbers in models.items():
        _heads(entropy, numbers.entropy, name)
        _heads(distance, numbers.distance, name)
    _axes(entropy, "entropy of a row, nats", theme)
    _axes(distance, "mean distance, patches", theme)
    _ceiling(entropy, max(numbers.tokens for numbers in models.values()), theme)
    if between is not None:
        _line(grid[2], between.js)
        _line(grid[3], between.cka)
        _axes(grid[2], "JS divergence from the teacher, nats", theme)
        _axes(grid[3], "linear CKA with the teacher", theme)
        grid[3].set_ylim(0, 1.04)
    if len(models) > 1:
        entropy.legend(frameon=False, fontsize=8, labelcolor=INK[theme], loc="lower right")
    return figure


def _heads(axes: Any, values_LH: Array, name: str) -> None:
    color = TEACHER if name == "teacher" else STUDENT
    nudge = {"teacher": -0.09, "student": 0.09}.get(name, 0.0)
    layers = np.arange(len(values_LH))
    for head in values_LH.T:
        axes.plot(layers + nudge, head, "o", color=color, markersize=4, alpha=0.45, markeredgewidth=0)
    axes.plot(layers + nudge, values_LH.mean(1), color=color, linewidth=2, label=name)


def _line(axes: Any, values: Sequence[float]) -> None:
    axes.plot(np.arange(len(values)), values, color=BETWEEN, linewidth=2, marker="o", markersize=5)


def _ceiling(axes: Any, tokens: int, theme: Theme) -> None:
    """Draw the entropy of even attention, the maximum."""
    top = math.log(tokens)
    axes.axhline(top, color=INK[theme], linewidth=0.8, linestyle=(0, (4, 4)))
    axes.annotate(
        f"even over {tokens} tokens", (0.01, top), xycoords=("axes fraction", "data"), va="bottom",
        color=INK[theme], fontsize=8,
    )  # fmt: skip
    axes.set_ylim(0, top * 1.12)


def _axes(axes: Any, title: str, theme: Theme) -> None:
    axes.set_title(title, color=INK[theme], fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)  # a dot at the top is shown whole
