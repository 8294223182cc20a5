"""Attention maps are drawn where they belong and on a scale that can be compared."""

from __future__ import annotations

import io

import numpy as np
from graftvit.transfer.analysis.demo.demo_cells import COLORS, Gaze, SummaryRow, draw_gazes, draw_summary
from graftvit.transfer.analysis.report.ink import to_png
from PIL import Image


def gaze(top: float = 0.5) -> Gaze:
    heat = np.full((2, 3), 0.1)
    heat[1, 2] = top
    maps = {"teacher": heat, "scratch": heat / 2}
    return Gaze(np.arange(24.0).reshape(4, 6), (1, 2), "layer 2", maps)


def test_maps_of_a_row_share_one_scale_and_the_query_is_outlined() -> None:
    figure = draw_gazes([gaze(0.5), gaze(0.9)], {"teacher": "Teacher", "scratch": "Scratch"}, "light")
    grid = np.array(figure.axes).reshape(2, 3)
    assert [axes.get_title() for axes in grid[0]] == ["image", "Teacher", "Scratch"]
    for row, top in zip(grid, (0.5, 0.9), strict=True):
        heats = [axes.images[1] for axes in row[1:]]
        assert [heat.get_clim() for heat in heats] == [(0, top)] * 2
        np.testing.assert_allclose(heats[1].get_array(), heats[0].get_array() / 2)
        for axes in row:  # patches are 2 pixels high and wide; row 1, column 2
            outline = axes.lines[0].get_xydata()
            assert outline.min(axis=0).tolist() == [4, 2]
            assert outline.max(axis=0).tolist() == [6, 4]


def test_the_summary_shows_means_as_strokes_and_seeds_as_dots() -> None:
    rows = [
        SummaryRow("scratch", "scratch", (80.0, 90.0)),
        SummaryRow("the teacher knows"),
        SummaryRow("copied", "copy", (88.0, 96.0)),
    ]
    figure = draw_summary(rows, [gaze()], {"teacher": "teacher", "scratch": "scratch"}, "light")
    axes = figure.axes[0]
    drawn = [(line.get_marker(), list(line.get_xdata()), line.get_color()) for line in axes.lines]
    assert drawn == [
        ("o", [88.0, 96.0], COLORS["copy"]),
        ("|", [92.0], COLORS["copy"]),
        ("o", [80.0, 90.0], COLORS["scratch"]),
        ("|", [85.0], COLORS["scratch"]),
    ]
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [0, 2]  # the first row is on top
    labels = [(label.get_text(), label.get_fontweight()) for label in axes.get_yticklabels()]
    assert labels == [("copied  92", "normal"), ("the teacher knows", "bold"), ("scratch  85", "normal")]
    assert Image.open(io.BytesIO(to_png(figure))).width > 1000
