"""Mean attention maps: the mean of the maps of single images, in bounded memory, where the pictures show it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert
from graftvit.models.errors import TransferError
from graftvit.models.families import sites
from graftvit.transfer.analysis.layer_maps import Cells, KeyPlaces, layer_maps, preprocessed, spread_images
from graftvit.transfer.analysis.visualize import average
from graftvit.transfer.analysis.visualize import visualize as looking
from graftvit.transfer.analysis.visualize.average import batch_that_fits, visualize_average
from graftvit.transfer.analysis.visualize.map_figures import LayerLook, Look, draw_grid, read_query
from graftvit.transfer.analysis.visualize.visualize import count_weights, look, token_layouts
from graftvit.transfer.config import DataConfig
from support.models.pyramids import TINY, arguments
from support.models.pyramids import tiny as pyramid
from support.models.visualize_models import picture, save, tiny
from torch import Tensor, nn

SIZE = (40, 24)


def models() -> dict[str, nn.Module]:
    """One of each kind of map: plain with a prefix, windows with padding, reduced keys, a class token, LIT."""
    lit = convert(pyramid("swin", SIZE), "stage1: none; stage2: linear; merge: deformable", without=["bias"])
    return {
        "plain": tiny("1: linear", img_size=SIZE),
        **{kind: pyramid(kind, SIZE) for kind in ("swin", "pvt", "pvt1", "svt")},
        "lit": lit.eval(),
    }


@pytest.mark.parametrize("name", ["plain", "swin", "pvt", "pvt1", "svt", "lit"])
def test_the_average_is_the_mean_of_the_maps_of_single_images(name: str) -> None:
    model = models()[name]
    images = torch.randn(5, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    layers = range(len(sites(model)))
    single = [layer_maps(model, image[None], layers) for image in images]
    looks = [look(model, image[None]) for image in images]
    found = average.average_maps(model, iter([images[:2], images[2:4], images[4:]]), layers)
    assert found.keys() == single[0].keys()
    assert len(found) < len(layers) or name != "lit"
    for layer, mean in found.items():
        expected = torch.stack([maps[layer].weights[0].double() for maps in single]).mean(0)
        assert mean.weights.dtype == torch.float64
        torch.testing.assert_close(mean.weights, expected, atol=1e-6, rtol=1e-5)
        for measure in ("entropy", "distance"):
            of_images = [getattr(each.layers[layer], measure)() for each in looks]
            np.testing.assert_allclose(getattr(mean, measure), np.mean(of_images, 0), atol=1e-5, rtol=1e-4)


def test_sums_are_exact_where_float32_is_not() -> None:
    """Ten thousand weights of 1/3 added in float32 would be wrong in the fourth digit."""
    places = KeyPlaces(token_layouts(tiny())[0].geometry)
    weights = torch.full((100, 1, 27, 27), 1 / 3)
    sums = average.MapSums()
    for _ in range(100):
        sums.add({0: average.LayerMap(weights, places)})
    assert sums.count == 10_000
    expected = torch.full((1, 27, 27), 1 / 3).double()
    torch.testing.assert_close(sums.means()[0].weights, expected, atol=1e-12, rtol=0)


def test_images_and_maps_of_earlier_batches_are_let_go() -> None:
    model, seen, most = tiny(), [], []

    def batches() -> Iterator[Tensor]:
        for number in range(12):
            most.append(sum(each() is not None for each in seen))
            images = torch.full((2, 3, 16, 24), float(number))
            seen.append(weakref.ref(images))
            yield images

    average.average_maps(model, average.MeanPicture().watch(batches()), range(2))
    assert max(most) <= 2
    assert batch_that_fits(2**20, 64) == 64
    assert batch_that_fits(2**24, 64) == 4
    assert batch_that_fits(2**30, 64) == 1
    swin = pyramid("swin", SIZE)
    assert count_weights(swin, [1], 4, "maps", "less") == 10 * 6 * 9  # one head, windows of three by three


def test_sums_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(looking, "MAX_MAP_BYTES", 100)
    model = save(tiny(), tmp_path / "model")
    with pytest.raises(TransferError, match=r"the sums of the maps of 2 layers take .* by --layers"):
        visualize_average(model, DataConfig(dataset="digits"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tokens", "windows", "cells"])
def test_a_constructed_attention_lands_on_its_pixels(kind: str) -> None:
    """Every query gives all to the key over row 2, column 1 of the 10 x 6 tokens."""
    model = pyramid("swin", SIZE)
    layout = token_layouts(model)[0]
    if kind == "windows":
        places = layer_maps(model, torch.zeros(1, 3, *SIZE), [0])[0].places
        token = 0 * 6 + 2  # in the window of the target
        maps = (places.window_tokens() == 2 * 6 + 1).float()[None]
        area = (8, 12, 4, 8)
    else:
        places = KeyPlaces(layout.geometry, cells=Cells((5, 3), (2, 2)) if kind == "cells" else None)
        token, key = 59, 1 * 3 + 0 if kind == "cells" else 2 * 6 + 1
        maps = torch.zeros(1, 60, 15 if kind == "cells" else 60)
        maps[:, :, key] = 1
        area = (8, 16, 0, 8) if kind == "cells" else (8, 12, 4, 8)
    query = read_query(f"{4 * (token // 6)}x{4 * (token % 6)}", token_layouts(model), SIZE)
    shown = Look([LayerLook(0, layout, maps, places)])
    figure = draw_grid(np.zeros((*SIZE, 3), np.uint8), shown, query, [0], "title")
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "mean", "head 0"]
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3].astype(int)  # type: ignore[attr-defined]
    axes = figure.axes[1]
    bright = np.zeros(SIZE, bool)
    for row, column in np.ndindex(SIZE):
        across, up = axes.transData.transform((column + 0.5, row + 0.5))
        bright[row, column] = (
            pixels[int(len(pixels) - up), int(across), 0] > 150
        )  # the heat is red, a frame is not
    top, bottom, left, right = area
    expected = np.zeros(SIZE, bool)
    expected[top:bottom, left:right] = True
    corner = np.s_[30:, 12:]  # where the number stands
    bright[corner] = expected[corner] = False
    np.testing.assert_array_equal(bright, expected)


def folder_of(path: Path, count: int) -> list[str]:
    path.mkdir()
    return [picture(path / f"{number}.png", number, size=(24, 40)) for number in range(count)]


def test_images_are_spread_evenly_over_a_split(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 6)
    config = DataConfig(data_path=str(tmp_path / "images"), workers=0)
    names = {
        count: [Path(source.path(index)).stem for index in range(len(source))]
        for count in (1, 2, 4, 6, 9, None)
        for source in [spread_images(config, 3, count)]
    }
    assert names[1] == ["3"]
    assert names[2] == ["1", "4"]
    assert names[4] == ["0", "2", "3", "5"]
    assert names[6] == names[9] == names[None] == list("012345")
    spec = Preprocessing.of(pyramid("swin", SIZE), input_size=(3, *SIZE))
    batches = list(preprocessed(spread_images(config, 3, None), config, spec, 4))
    assert [each.shape for each in batches] == [(4, 3, *SIZE), (2, 3, *SIZE)]


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, model = tmp_path_factory.mktemp("swin"), pyramid("swin", SIZE)
    described = {"architecture": TINY["swin"][0], "model_args": arguments("swin", SIZE)}
    spec = Preprocessing.of(model, input_size=(3, *SIZE))
    write_student(model, folder / "model", preprocessing=spec, **described)
    return f"local-dir:{folder / 'model'}"


def test_the_folder_has_arrays_pictures_and_a_page(swin: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 3)
    config, told, out = DataConfig(data_path=str(tmp_path / "images"), workers=0), [], tmp_path / "out"
    index = visualize_average(
        swin, config, out, teacher=swin, queries=["3x20"], layers="stage1", tell=told.append
    )
    names = {path.name for path in out.iterdir()}
    pictures = {"average_3x20.png", "average_3x20_teacher.png", "layers.png"}
    assert names == pictures | {"average.npz", "average_teacher.npz", "numbers.json", "index.html"}
    assert told[0].startswith("student: mean of 3 images, 0.0 MB in ")
    assert len(told) == 2  # of the student and the teacher
    model = pyramid("swin", SIZE)
    spec = Preprocessing.of(model, input_size=(3, *SIZE))
    [images] = preprocessed(spread_images(config, 3, None), config, spec, 3)
    expected = layer_maps(model, images, [0, 1])
    with np.load(out / "average.npz") as arrays:
        assert int(arrays["images"]) == 3
        assert {name for name in arrays if name.endswith(".maps")} == {"stage1.0.maps", "stage1.1.maps"}
        for layer in (0, 1):
            mean = expected[layer].weights.mean(0).numpy()
            np.testing.assert_allclose(arrays[f"stage1.{layer}.maps"], mean, atol=1e-6)
            assert arrays[f"stage1.{layer}.queries"].tolist() == [10, 6]
            tokens = expected[layer].places.window_tokens().numpy()
            np.testing.assert_array_equal(arrays[f"stage1.{layer}.tokens"], tokens)
    page = index.read_text()
    assert "mean of 3 images" in page
    assert '"rollout":null' in page


def test_layers_of_a_plain_model_have_their_numbers(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 1)
    config = DataConfig(data_path=str(tmp_path / "images"), workers=0)
    visualize_average(save(tiny(), tmp_path / "model"), config, tmp_path / "out", layers="1")
    with np.load(tmp_path / "out" / "average.npz") as arrays:
        assert set(arrays) == {"images", "1.maps", "1.prefix", "1.queries", "1.keys"}
        assert arrays["1.maps"].shape == (2, 27, 27)
        np.testing.assert_allclose(arrays["1.maps"].sum(-1), 1, rtol=1e-5)


def test_ctrl_c_leaves_what_was_there(swin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "images", 3)
    out = tmp_path / "out"
    out.mkdir()
    (out / "average.npz").write_bytes(b"earlier")
    add = average.MapSums.add

    def interrupted(sums: average.MapSums, maps: dict[int, average.LayerMap]) -> None:
        if sums.count:
            raise KeyboardInterrupt
        add(sums, maps)

    monkeypatch.setattr(average.MapSums, "add", interrupted)
    config = DataConfig(data_path=str(tmp_path / "images"), workers=0, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        visualize_average(swin, config, out)
    assert [path.name for path in out.iterdir()] == ["average.npz"]
    assert (out / "average.npz").read_bytes() == b"earlier"


def test_a_look_is_shown_as_before() -> None:
    seen = look(tiny(), torch.zeros(1, 3, 16, 24))
    assert all(isinstance(layer, LayerLook) for layer in seen.layers)
    figure = draw_grid(
        np.zeros((16, 24, 3), np.uint8), seen, read_query("2", seen.layouts, (16, 24)), [0], "t"
    )
    assert [axes.get_title() for axes in figure.axes[:5]] == ["image", "mean", "rollout", "head 0", "head 1"]
