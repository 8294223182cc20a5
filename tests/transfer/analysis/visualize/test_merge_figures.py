"""The places that deformable merges read are those of their convolution, and lie there in the picture and the page."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest
import torch
from graftvit.models.conversion import convert
from graftvit.models.merges import merge_layers
from graftvit.transfer.analysis.layer_maps import collect_merges, trace
from graftvit.transfer.analysis.visualize.map_figures import Query, read_query
from graftvit.transfer.analysis.visualize.map_page import View, draw_merges, embed
from graftvit.transfer.analysis.visualize.visualize import look
from support.models.pyramids import images, tiny
from support.models.visualize_models import chain
from torch import nn

SIZE = (40, 24)
SHIFTS = torch.tensor([[0.25, -0.5], [1.25, 0.75], [-2.5, 0.0], [0.0, 3.25]])
"""Of the taps, in tokens, down and right."""


def shifted(kind: str = "swin", size: tuple[int, int] = SIZE) -> nn.Module:
    """A pyramid whose merge reads at constant shifts."""
    model = convert(tiny(kind, size), "merge: deformable").eval()
    for merge in merge_layers(model):
        nn.init.zeros_(merge.dconv.conv_offset.weight)
        merge.dconv.conv_offset.bias.data = SHIFTS.flatten()
    return model


@pytest.mark.parametrize("kind", ["swin", "svt", "pvt", "pvt1"])
def test_places_are_those_that_the_convolution_reads(kind: str) -> None:
    """The input has a gradient at the four neighbors of each place, and nowhere else."""
    model = shifted(kind)
    [merge] = merge_layers(model)
    [seen] = look(model, images(SIZE, 1)).merges
    assert (seen.grid, seen.merged, seen.token) == ((10, 6), (5, 3), (1 / 10, 1 / 6))
    x = torch.randn(1, merge.dconv.in_channels, 10, 6, requires_grad=True)
    for row, column in [(0, 0), (2, 1), (4, 2)]:
        [gradient] = torch.autograd.grad(merge.dconv(x)[0, :, row, column].square().sum(), x)
        expected = torch.zeros(10, 6, dtype=torch.bool)
        for down, right in seen.places_hwt2[row, column].tolist():
            for y in {math.floor(down), math.ceil(down)}:
                for x_at in {math.floor(right), math.ceil(right)}:
                    if 0 <= y < 10 and 0 <= x_at < 6:
                        expected[y, x_at] = True
        assert torch.equal(gradient[0].abs().sum(0) > 0, expected)


def test_places_lie_in_the_image_where_their_tokens_are() -> None:
    [seen] = look(shifted(), images(SIZE, 1)).merges
    tokens = SHIFTS + torch.tensor([[2 * 3, 2 * 1], [6, 3], [7, 2], [7, 3]])
    expected = (tokens * 4 + 2) / torch.tensor(SIZE)  # a token has four pixels
    torch.testing.assert_close(seen.in_image()[3, 1], expected)
    torch.testing.assert_close(seen.shift()[3, 1], 4 * SHIFTS.norm(dim=1))
    outside = (seen.places_hwt2 <= -1) | (seen.places_hwt2 >= torch.tensor([10, 6]))
    assert torch.equal(seen.outside() > 0, outside.any(-1))
    assert 0 < seen.outside().mean() < 1


def test_an_odd_row_is_left_out_and_no_token_is_there() -> None:
    """36 x 44 pixels have 9 x 11 tokens, of which the merge takes 8 x 10."""
    [seen] = look(shifted("swin", (36, 44)), images((36, 44), 1)).merges
    assert seen.merged == (4, 5)
    assert seen.token_at((31.9 / 36, 39.9 / 44)) == (3, 4)
    assert seen.token_at((32.1 / 36, 0.0)) is None
    assert seen.token_at((0.0, 40.1 / 44)) is None
    drawn = draw_merges(np.zeros((36, 44, 3), np.uint8), [seen], Query("35x0", (35.5 / 36, 0.01)), "title")
    assert [len(axes.lines) for axes in drawn.axes] == [1, 0, 0]  # all places, and no token has any


def test_a_model_in_training_reads_as_in_eval_and_is_left_as_it_was() -> None:
    model = shifted().train()
    [merge] = merge_layers(model)
    mean = merge.norm_layer.running_mean.clone()  # type: ignore[union-attr]
    [trained] = look(model, images(SIZE, 1)).merges
    [evaluated] = look(model.eval(), images(SIZE, 1)).merges
    assert torch.equal(trained.places_hwt2, evaluated.places_hwt2)
    assert torch.equal(merge.norm_layer.running_mean, mean)  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())
    with collect_merges(tiny("swin"), images((32, 32), 1)) as found:
        tiny("swin")(images((32, 32), 1))
    assert found == []


@pytest.mark.parametrize("sides", [(16, 24), (19, 9)])
def test_a_trace_goes_from_token_to_token(sides: tuple[int, int]) -> None:
    merges = chain(3, sides, 3)

    def follow(level: int, row: int, column: int) -> list[tuple[float, float]]:
        """Restate the walk of the paper's picture, one token after the other."""
        height, width = merges[level].merged
        if not (0 <= row < height and 0 <= column < width):
            return []
        reached = [(down, right) for down, right in merges[level].places_hwt2[row, column].tolist()]
        if level == 0:
            return [((down + 0.5) / sides[0], (right + 0.5) / sides[1]) for down, right in reached]
        nearest = [(math.floor(down + 0.5), math.floor(right + 0.5)) for down, right in reached]
        return [place for at in nearest for place in follow(level - 1, *at)]

    ended = False
    for level in range(3):
        for row in range(merges[level].merged[0]):
            for column in range(merges[level].merged[1]):
                expected = torch.tensor(follow(level, row, column)).reshape(-1, 2)
                found = trace(merges[: level + 1], (row, column))
                torch.testing.assert_close(found, expected)
                ended |= len(found) < 4 ** (level + 1)
    assert ended, "some place is outside of a grid"


def test_dots_are_on_their_pixels() -> None:
    merges = look(shifted(), images(SIZE, 1)).merges
    picture = np.zeros((*SIZE, 3), np.uint8)
    query = read_query("25x13", look(shifted(), images(SIZE, 1)).layouts, SIZE)
    figure = draw_merges(picture, merges, query, "title")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3].astype(int)  # type: ignore[attr-defined]
    whole, one, traced = figure.axes
    places = merges[0].in_image()[3, 1] * torch.tensor(SIZE)
    assert merges[0].token_at((25.5 / 40, 13.5 / 24)) == (3, 1)
    inside = [place for place in places.tolist() if place[1] < 24]
    assert len(inside) == 3, "the last place is right of the image"
    for axes in (one, traced):
        for down, right in inside:
            across, up = axes.transData.transform((right, down))
            color = pixels[int(len(pixels) - up), int(across)]
            assert (abs(color - [255, 59, 48]) < 40).all()
    box = one.lines[0].get_xydata()
    assert (box.min(0).tolist(), box.max(0).tolist()) == (
        [8, 24],
        [16, 32],
    )  # two by two tokens of four pixels
    dots = {tuple(point) for point in whole.lines[0].get_xydata().round(4).tolist()}
    everywhere = (merges[0].in_image() * torch.tensor(SIZE)).flip(-1).flatten(0, 2).double()
    assert dots == {tuple(point) for point in everywhere.numpy().round(4).tolist()}


def test_a_prefix_token_has_no_place() -> None:
    merges = look(shifted("pvt1"), images(SIZE, 1)).merges
    figure = draw_merges(np.zeros((*SIZE, 3), np.uint8), merges, Query("cls", None), "title")
    assert len(figure.axes) == 1


def test_the_page_has_the_places() -> None:
    seen = look(shifted(), images(SIZE, 1))
    view = View("x", {"student": np.zeros((*SIZE, 3), np.uint8)}, {"student": seen})
    [merge] = embed(view, [3])["merges"]["student"]
    places = np.frombuffer(base64.b64decode(merge["places"]), "<f4").reshape(5, 3, 4, 2)
    np.testing.assert_array_equal(places, seen.merges[0].in_image().numpy())
    assert (merge["grid"], merge["token"]) == ((5, 3), (1 / 10, 1 / 6))
    assert merge["name"] == "stage 1 to 2: 10x6 to 5x3"
