"""What is seen of a model is what its operators do: every operator, every prefix, teacher beside student."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graftvit.models.attention.base import Heads
from graftvit.models.errors import ConfigError, TransferError
from graftvit.transfer.analysis.report.ink import Panel, Scale
from graftvit.transfer.analysis.visualize import visualize as looking
from graftvit.transfer.analysis.visualize.map_figures import (
    default_query,
    draw_beside,
    draw_grid,
    read_query,
    shared_scale,
    shares,
    token_name,
)
from graftvit.transfer.analysis.visualize.map_page import Shown, View, draw_layers, embed, quantize
from graftvit.transfer.analysis.visualize.partners import Partner, Partners, cka, divergence
from graftvit.transfer.analysis.visualize.visualize import look, token_layouts
from PIL import Image
from support.models.operator_cases import CASES, Case
from support.models.visualize_models import GRID, PREFIX, TOKENS, operator_inputs, tiny

BY_NAME = list({case.operator: case for case in reversed(CASES)}.values())


def image(seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(1, 3, 16, 24)


@pytest.mark.parametrize("case", BY_NAME, ids=str)
def test_every_operator_shows_its_effective_map(case: Case) -> None:
    """The map is what the layer gives for V := I; of an operator that is not linear in V, its Jacobian."""
    model = tiny(f"1: {case}; 0: softmax")
    seen = look(model, image())
    maps = [layer.maps for layer in seen.layers]
    assert [each.shape for each in maps if each is not None] == [(2, TOKENS, TOKENS)] * 2
    shown_map = maps[1]
    assert shown_map is not None
    if case.operator != "softmax":
        operator, heads = operator_inputs(model, image(), 1)
        if operator.traits.linear_in_v:
            eye = torch.eye(TOKENS).expand(1, 2, -1, -1)
            with_eye = Heads(heads.q, heads.k, eye, None, heads.scale, geometry=heads.geometry)
            expected = operator.attend(with_eye)[0]
            torch.testing.assert_close(shown_map, expected, atol=1e-5, rtol=1e-4)
        else:
            some = operator.rows(heads, torch.tensor([0, 9]))[0]
            torch.testing.assert_close(shown_map[:, [0, 9]], some)
    for layer in seen.layers:
        entropy, distance = layer.entropy(), layer.distance()
        assert entropy is not None
        assert distance is not None
        assert np.isfinite(entropy).all()
        assert (entropy <= math.log(TOKENS) + 1e-5).all()
        assert (distance <= math.dist((0, 0), (3, 5))).all()
        torch.testing.assert_close(layer.rolled.sum(-1), torch.ones(TOKENS))
    shown = Shown("x", Image.new("RGB", (24, 16)), np.zeros((16, 24, 3), np.uint8))
    query = read_query("2", seen.layouts, (16, 24))
    assert query.token(seen.layouts[1]) == 5
    figure = draw_grid(shown.pixels, seen, query, [0, 1], "title")
    heat = figure.axes[5 + 3].images[1].get_array()  # second row: image, mean, rollout, head 0
    np.testing.assert_allclose(heat, shown_map[0, 5, PREFIX:].reshape(GRID))
    embedded = embed(View("x", {"student": shown.pixels}, {"student": seen}), [1])
    assert [layer["signed"] for layer in embedded["models"]["student"]] == [bool((shown_map < 0).any())]


def test_tokens_are_those_after_each_block() -> None:
    model = tiny("*: linear")
    tokens = [layer.tokens for layer in look(model, image()).layers]
    _, expected = model.forward_intermediates(image(), return_prefix_tokens=True, output_fmt="NLC")  # type: ignore[operator]
    for found, (patches, prefix) in zip(tokens, expected, strict=True):
        torch.testing.assert_close(found, torch.cat([prefix, patches], 1)[0])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("0: linear").train()
    before = [type(block.attn) for block in model.blocks]  # type: ignore[union-attr]
    look(model, image())
    assert model.training
    assert [type(block.attn) for block in model.blocks] == before  # type: ignore[union-attr]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_divergence_and_cka_of_a_model_with_itself() -> None:
    one, other = look(tiny(), image()), look(tiny("*: linear"), image())
    assert divergence(one.layers, one) == [0, 0]
    patches = [layer.patches for layer in one.layers]
    torch.testing.assert_close(patches[0], one.layers[0].tokens[PREFIX:])
    assert cka([patches], [patches]) == pytest.approx([1, 1])
    maps = [each.layers[0].maps for each in (one, other)]
    p, q = (shares(each).double() for each in maps if each is not None)
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).mean() / 2
    assert divergence(one.layers, other)[0] == pytest.approx(js.item(), rel=1e-4)
    assert js > 0


def test_models_with_other_prefixes_and_heads_are_compared_over_patches() -> None:
    student = look(tiny(), image())
    teacher = look(tiny(reg_tokens=0, num_heads=4), image())
    assert all(each is not None and 0 < each < math.log(2) for each in divergence(teacher.layers, student))


def test_maps_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "MAX_MAP_BYTES", 1000)
    with pytest.raises(TransferError, match=r"2 layers take .* \(layer 0: 2 heads, 27 tokens\)"):
        look(tiny(), image())


def test_queries() -> None:
    layouts, size = token_layouts(tiny()), (16, 24)
    asked = [read_query(word, layouts, size).token(layouts[0]) for word in ("cls", "reg1", "0", "23")]
    assert asked == [0, 2, 3, 26]
    assert default_query(layouts, size).word == "cls"
    thirteen = read_query("13", layouts, size)
    assert token_name(thirteen.token(layouts[0]) or 0, layouts[0]) == "patch 13 (row 2, column 1)"
    assert thirteen.title(layouts) == "patch 13 (row 2, column 1)"
    assert read_query("cls", layouts, size).title(layouts) == "the class token"
    for pixel, patch in {"0x0": 0, "3x4": 1, "4x3": 6, "15x23": 23}.items():
        assert read_query(pixel, layouts, size).token(layouts[0]) == PREFIX + patch
    for wrong in ("24", "-1", "reg2", "16x0", "0x24", "x"):
        with pytest.raises(ConfigError, match=r"valid are patches 0 to 23, cls, reg0, reg1, and .* to 15x23"):
            read_query(wrong, layouts, size)


def test_quantized_rows_are_near() -> None:
    rows = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    rows[2] = 0
    parts, scale = quantize(rows)
    assert np.abs(parts / 127 * scale[:, None] - rows).max() <= scale.max() / 254 * 1.001
    assert parts.min() < 0


def test_the_dots_of_one_model_are_on_the_ticks_of_their_layers() -> None:
    numbers = look(tiny(), image()).numbers()
    for axes, heads in zip(
        draw_layers({"student": numbers}, None, "light").axes,
        [numbers.entropy, numbers.distance],
        strict=True,
    ):
        dots, means = axes.lines[:2]
        assert dots.get_xdata().tolist() == np.repeat([0, 1], len(heads[0])).tolist()
        assert means.get_xdata().tolist() == [0, 1]
        assert axes.get_xlim() == (-0.5, 1.5)
        assert axes.get_ylim()[1] >= max(map(max, heads))


def test_all_panels_of_a_picture_share_a_scale_and_a_color_bar() -> None:
    teacher, student = look(tiny(), image()), look(tiny(num_heads=4, seed=3), image())
    pixels, query = np.zeros((16, 24, 3), np.uint8), read_query("5", token_layouts(tiny()), (16, 24))
    beside = Partners({0: Partner(1), 1: Partner(0)}, "").beside(teacher, student)
    for panels, figure in (
        (12, draw_grid(pixels, student, query, [0, 1], "heads\nname")),
        (8, draw_beside([pixels, pixels], [beside, student], query, [0, 1], "beside")),
    ):
        heats = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
        assert len(heats) == panels
        [(low, top)] = {heat.get_clim() for heat in heats}
        assert low == 0
        largest = max(float(heat.get_array().max()) for heat in heats)
        assert 0.1 * largest < top <= largest
        [bar] = [axes for axes in figure.axes if axes.get_ylabel() == "attention weight"]
        assert bar.get_ylim() == (0, top)
        assert float(bar.get_yticklabels()[-1].get_text()) == pytest.approx(top, rel=0.1)
        figure.draw_without_rendering()
        for axes in figure.axes:
            drawn = axes.yaxis.label.get_window_extent()
            assert figure.bbox.y0 <= drawn.y0 <= drawn.y1 <= figure.bbox.y1


def test_a_weight_that_outshines_all_is_beyond_the_scale() -> None:
    heat = np.full((20, 20), 0.001)
    heat[3, 4] = 0.9
    scale = shared_scale(
        [Panel(heat, (1.0, 1.0), (20, 20), None), Panel(0 * heat, (1.0, 1.0), (20, 20), None)]
    )
    assert scale == Scale(0.001, signed=False, clipped=True)
    assert shared_scale([Panel(-heat[5:], (1.0, 1.0), (15, 20), None, signed=True)]) == Scale(
        0.001, signed=True
    )
