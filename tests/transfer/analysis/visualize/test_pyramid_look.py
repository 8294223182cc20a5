"""What is seen of a pyramid: stage by stage, from a place of the image, with the keys that each layer has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graftvit.checkpoints.pretrained import describe_model
from graftvit.models.conversion import convert
from graftvit.models.errors import ConfigError
from graftvit.models.families import depths, sites
from graftvit.transfer.analysis.layer_maps import layer_maps
from graftvit.transfer.analysis.visualize.map_figures import default_query, draw_beside, draw_grid, read_query
from graftvit.transfer.analysis.visualize.partners import divergence, pair_layers
from graftvit.transfer.analysis.visualize.visualize import look, token_layouts
from support.models.pyramids import TINY, images, tiny
from support.models.visualize_models import tiny as vit

SIZE = (40, 24)
PICTURE = np.zeros((*SIZE, 3), np.uint8)


@pytest.mark.parametrize("kind", TINY)
def test_rollout_starts_again_in_each_stage(kind: str) -> None:
    model, image = tiny(kind, SIZE), images(SIZE, 1)
    seen = look(model, image)
    maps = layer_maps(model, image, range(len(seen.layers)))
    assert [layer.stage for layer in seen.layers] == [
        n for n, depth in enumerate(depths(model)) for _ in range(depth)
    ]
    rolled = torch.empty(0)
    for site, layer in zip(sites(model), seen.layers, strict=True):
        heads = maps[site.index].on_tokens()[0].double()
        mean = (heads / heads.sum(-1, keepdim=True)).mean(0)  # without what padding takes
        eye = torch.eye(len(mean), dtype=torch.float64)
        rolled = (mean + eye) / 2 @ (eye if site.place == 0 else rolled)
        torch.testing.assert_close(layer.rolled.double(), rolled, atol=1e-6, rtol=1e-5)
        assert layer.tokens.shape == (layer.layout.num_tokens, site.width)


def test_tokens_are_those_after_each_block() -> None:
    model = tiny("swin", SIZE)
    stages = model.forward_intermediates(images(SIZE, 1), intermediates_only=True)  # type: ignore[operator]
    seen = look(model, images(SIZE, 1))
    torch.testing.assert_close(seen.layers[1].tokens, stages[0][0].flatten(1).T)
    torch.testing.assert_close(seen.layers[3].tokens, stages[1][0].flatten(1).T)


def test_a_place_is_in_the_grid_of_every_stage() -> None:
    layouts = token_layouts(tiny("svt", SIZE))
    assert [layout.grid for layout in layouts] == [(10, 6), (10, 6), (5, 3), (5, 3)]
    asked = read_query("17x23", layouts, SIZE)
    assert [asked.token(layout) for layout in layouts] == [4 * 6 + 5, 4 * 6 + 5, 2 * 3 + 2, 2 * 3 + 2]
    assert asked.title(layouts) == "the pixel at row 17, column 23"
    assert default_query(layouts, SIZE).word == "20x12"
    with pytest.raises(
        ConfigError, match=r"--query '5': valid are places in pixels, 0x0 to 39x23 \(row x column\)"
    ):
        read_query("5", layouts, SIZE)


def test_a_class_token_of_one_stage_asks_in_that_stage() -> None:
    model = tiny("pvt1", SIZE)
    seen = look(model, images(SIZE, 1))
    asked = read_query("cls", seen.layouts, SIZE)
    assert [asked.token(layout) for layout in seen.layouts] == [None, 0, 0]
    assert asked.title(seen.layouts) == "the class token"
    figure = draw_grid(PICTURE, seen, asked, [0, 1], "title")
    assert not figure.axes[1].images  # the first stage has none
    last = seen.layers[1].maps
    assert last is not None
    rows, columns = seen.layers[1].layout.grid
    heat = figure.axes[6].images[1].get_array()  # image and mean of the second row
    np.testing.assert_allclose(heat, last[:, 0, 1:].mean(0).reshape(rows, columns), rtol=1e-5)


@pytest.mark.parametrize(("kind", "keys"), [("pvt", (5, 3)), ("svt", (10, 6)), ("swin", (10, 6))])
def test_a_picture_has_the_grid_of_the_keys(kind: str, keys: tuple[int, int]) -> None:
    seen = look(tiny(kind, SIZE), images(SIZE, 1))
    asked = read_query("17x23", seen.layouts, SIZE)
    layer = seen.layers[0]
    figure = draw_grid(PICTURE, seen, asked, [0], "title")
    mean = np.asarray(figure.axes[1].images[1].get_array())
    assert mean.shape == keys == layer.places.grid
    token = asked.token(layer.layout)
    assert token == 29
    assert layer.maps is not None
    if kind == "pvt":
        np.testing.assert_allclose(mean.ravel(), layer.maps[0, token], rtol=1e-5)
    else:  # the window of row 4, column 5: rows 3 to 5, columns 3 to 5
        assert (mean[3:6, 3:6] > 0).all()
        assert mean.sum() == pytest.approx(mean[3:6, 3:6].sum())
    frame = figure.axes[1].lines[0].get_xydata()
    assert frame.min(0).tolist() == [20, 16]  # of the patch that asks, in pixels
    assert frame.max(0).tolist() == [24, 20]


def test_layers_without_attention_are_empty_and_keep_the_rollout() -> None:
    teacher = tiny("svt", SIZE)
    student = convert(teacher, "stage1.1: none; stage2: linear")
    seen, theirs = look(student, images(SIZE, 1)), look(teacher, images(SIZE, 1))
    assert seen.layers[1].maps is None
    assert seen.layers[1].entropy() is None
    assert torch.equal(seen.layers[1].rolled, seen.layers[0].rolled)
    js = divergence(theirs.layers, seen)
    assert js[0] == pytest.approx(0, abs=1e-6)
    assert js[1] is None
    assert all(each is not None and each > 0.001 for each in js[2:])
    asked = read_query("0x0", seen.layouts, SIZE)
    figure = draw_beside([PICTURE, PICTURE], [theirs, seen], asked, [1], "title")
    shown = [bool(axes.images) for axes in figure.axes[1:5]]
    assert shown == [True, False, True, True]  # the student has no mean, but a rollout


def test_stages_of_other_depths_are_paired_within_each() -> None:
    """Twins of 2 + 2 blocks beside PVT of 1 + 2; and of a model with one stage over the whole depth."""
    student = describe_model(tiny("pvt", SIZE))
    assert pair_layers(tiny("svt", SIZE), student).numbers(3) == [1, 2, 3]
    assert pair_layers(vit(depth=6), student).numbers(3) == [1, 3, 5]
