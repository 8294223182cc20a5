"""The attention that a comparison shows of each cell: the row of its default query, on its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.models.conversion import convert
from graftvit.transfer.analysis.compare.comparison_plots import draw_maps, map_figure
from graftvit.transfer.analysis.compare.student_cell import CellMaps, keep_maps, load_maps
from graftvit.transfer.analysis.layer_maps import layer_maps, preprocessed, spread_images
from graftvit.transfer.analysis.report.ink import Panel
from graftvit.transfer.config import DataConfig
from support.models.pyramids import images
from support.models.pyramids import tiny as pyramid
from support.models.visualize_models import GRID, picture, save, tiny
from torch import nn

SIZE = (40, 24)


def models() -> dict[str, nn.Module]:
    converted = convert(pyramid("svt", SIZE), "stage1.1: none; stage2: linear")
    pyramids = {kind: pyramid(kind, SIZE) for kind in ("swin", "pvt", "pvt1")}
    return {"plain": tiny(img_size=SIZE), "ttt": tiny("1: ttt", img_size=SIZE), "lin": converted, **pyramids}


@pytest.mark.parametrize("name", ["plain", "ttt", "lin", "swin", "pvt", "pvt1"])
def test_one_row_is_that_of_the_whole_map(name: str) -> None:
    model, given = models()[name].eval(), images(SIZE)
    whole = layer_maps(model, given, range(2))
    asking = {layer: 3 + layer for layer in range(2)}
    rows = layer_maps(model, given, range(2), asking=asking)
    assert rows.keys() == whole.keys()
    for layer, each in rows.items():
        assert each.weights.shape[2] == 1
        expected = whole[layer].weights[:, :, asking[layer]]
        torch.testing.assert_close(each.weights[:, :, 0], expected, atol=1e-5, rtol=1e-4)


def folder_of(path: Path, size: tuple[int, int]) -> DataConfig:
    path.mkdir()
    for number in range(4):
        picture(path / f"{number}.png", number, size=size)
    return DataConfig(data_path=str(path), workers=0)


def test_what_is_kept_is_the_mean_of_the_heads(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "images", (24, 16))
    loaded = load_pretrained(save(tiny("1: linear"), tmp_path / "model"))
    keep_maps(loaded, data, tmp_path)
    kept = load_maps(tmp_path)
    assert kept is not None
    assert (kept.query, kept.layers, len(kept.pictures)) == ("the class token", [0, 1], 2)
    [given] = preprocessed(spread_images(data, 3, 2), data, loaded.preprocessing, 2)
    whole = layer_maps(loaded.model, given, [0, 1])
    for (image, layer), each in kept.maps.items():
        expected = whole[layer].weights[image, :, 0, 3:].mean(0).reshape(GRID)
        np.testing.assert_allclose(each.heat, expected, atol=1e-6)
        assert each.asking is None


def test_a_data_set_without_images_leaves_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_pretrained(save(tiny(), tmp_path / "model"))
    keep_maps(loaded, DataConfig(data_path=str(tmp_path / "none"), workers=0), tmp_path)
    assert load_maps(tmp_path) is None
    assert "no attention maps" in caplog.text
    assert map_figure({"a": None}) is None


def test_maps_lie_side_by_side_on_the_same_images() -> None:
    """Of two cells the one has all its weight on one patch; a layer has no attention, and a cell no map."""
    pictures = [np.zeros((16, 24, 3), np.uint8) for _ in range(2)]
    columns = [(image, layer) for image in range(2) for layer in (0, 3)]
    heats = {}
    for number, column in enumerate(columns):
        heat = np.zeros((4, 6), np.float32)
        heat[number, 5 - number] = 1
        heats[column] = Panel(heat, (1.0, 1.0), (4, 6), (1, 1))
    without = {**heats, (1, 3): Panel(np.zeros((0, 0), np.float32), (1.0, 1.0), (4, 6), (1, 1))}
    shown = CellMaps("7", pictures, heats)
    figure = draw_maps({"one": shown, "gap": CellMaps("7", pictures, without), "old": None}, shown, "light")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3].astype(int)  # type: ignore[attr-defined]
    grid = np.array(figure.axes[:16]).reshape(4, 4)  # a color bar follows
    for number in range(4):
        bright = np.zeros((4, 6), bool)
        for row, column in np.ndindex(4, 6):
            across, up = grid[1, number].transData.transform((4 * column + 2, 4 * row + 2))
            bright[row, column] = (
                pixels[int(len(pixels) - up), int(across), 0] > 150
            )  # the heat is red, a frame is not
        bright[3, 4:] = False  # where the number stands
        expected = heats[columns[number]].heat > 0
        np.testing.assert_array_equal(bright & expected, expected)
        assert bright.sum() == 1
    said = [[text.get_text() for text in axes.texts] for axes in grid.ravel()]
    assert said[8:12] == [["1"], ["1"], ["1"], ["no attention"]]
    assert said[12:] == [["no map"]] * 4
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["", "one", "gap", "old"]


def test_the_maps_of_a_column_share_a_scale_and_a_color_bar() -> None:
    pictures = [np.zeros((8, 8, 3), np.uint8)]

    def kept(weights: float) -> CellMaps:
        heat = np.full((2, 2), weights)
        heat[0, 0] /= 2
        return CellMaps("the class token", pictures, {(0, 3): Panel(heat, (1.0, 1.0), (2, 2), None)})

    cells = {"strong": kept(0.4), "weak": kept(0.1)}
    figure = draw_maps(cells, cells["strong"], "light")
    heats = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert [heat.get_clim() for heat in heats] == [(0, 0.4), (0, 0.4)]
    assert "weight / the largest number of the column" in [axes.get_ylabel() for axes in figure.axes]
    numbers = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert numbers == ["0.4", "0.1"]
