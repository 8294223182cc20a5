"""The pictures: what is drawn is what was given, readable in both inks."""

from __future__ import annotations

import io
import itertools
import warnings

import numpy as np
import pytest
from graftvit.transfer.analysis.demo.demo_cells import COLORS, Curve, Panel, draw_curves, draw_divergence
from graftvit.transfer.analysis.report.ink import INK, Theme, to_png
from matplotlib.collections import PolyCollection
from PIL import Image


def curve(method: str, *rows: list[float]) -> Curve:
    return Curve(method, method.title(), range(len(rows[0])), np.array(rows))


def panel(*curves: Curve) -> Panel:
    return Panel("the teacher", curves)


@pytest.mark.parametrize("draw", [draw_curves, draw_divergence])
def test_a_line_is_the_mean_and_its_band_one_sample_deviation(draw: object) -> None:
    axes = draw([panel(curve("copy", [10.0, 60.0, 80.0], [20.0, 70.0, 84.0]))], "light").axes[0]  # type: ignore[operator]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [15, 65, 82])
    assert axes.lines[0].get_color() == COLORS["copy"]
    (band,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    corners = band.get_paths()[0].vertices
    last = corners[corners[:, 0] == 2][:, 1]
    assert last.min() == pytest.approx(82 - np.sqrt(8))
    assert last.max() == pytest.approx(82 + np.sqrt(8))


def test_one_seed_has_no_band_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_png(draw_curves([panel(curve("copy", [10.0, 60.0]))], "dark"))


def test_the_end_of_every_curve_stays_in_view() -> None:
    panels = [panel(curve("scratch", [9.0, 20.0])), panel(curve("copy", [11.0, 99.0]))]
    for axes in draw_curves(panels, "light").axes:  # on one scale
        low, high = axes.get_ylim()
        assert low < 20
        assert high > 99


def test_names_of_lines_that_meet_do_not_touch() -> None:
    curves = [curve(name, [0.0, 80.0 + shift]) for shift, name in enumerate(("scratch", "copy", "distill"))]
    figure = draw_curves([panel(*curves, curve("finetune", [0.0, 20.0])), panel(curves[0])], "light")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["the teacher"] * 2
    to_png(figure)
    boxes = sorted(label.get_window_extent().extents[[1, 3]].tolist() for label in figure.axes[0].texts)
    assert len(boxes) == 4
    assert all(below[1] <= above[0] for below, above in itertools.pairwise(boxes))
    order = sorted(figure.axes[0].texts, key=lambda label: label.xy[1])
    assert [label.get_text() for label in order] == ["Finetune", "Scratch", "Copy", "Distill"]
    assert order[0].xy[1] == pytest.approx(20)  # one that stands alone is at the end of its line


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_ground_is_transparent_and_the_ink_is_the_theme_s(theme: Theme) -> None:
    figure = draw_curves([panel(curve("copy", [10.0, 60.0]))], theme)
    assert figure.axes[0].xaxis.label.get_color() == INK[theme]
    image = Image.open(io.BytesIO(to_png(figure)))
    assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]
    solid = Image.open(io.BytesIO(to_png(figure, ground="white")))
    assert solid.getpixel((0, 0)) == (255, 255, 255, 255)
