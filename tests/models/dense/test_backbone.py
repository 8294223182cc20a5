"""Any timm model gives maps of images of any size, and keeps no parameter that no map needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.converted import converted_layers
from graftvit.models.dense.backbone import Backbone, any_size_arguments
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.families import create_timm_model
from graftvit.models.small import without_memory
from support.models.dense_bodies import BODIES, body
from torch import Tensor, nn

SIZE = (96, 160)


@pytest.mark.parametrize("name", BODIES)
def test_maps_are_those_of_the_model_and_every_parameter_is_trained(name: str) -> None:
    torch.manual_seed(0)
    model: Any = body(name).eval()
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
    backbone = Backbone(model)
    strides = [16] if "vit" in name else [4, 8, 16, 32]
    assert backbone.strides == strides
    maps = backbone(images)
    for found, wanted, channels, stride in zip(
        maps, expected[-len(strides) :], backbone.channels, strides, strict=True
    ):
        assert found.shape == (2, channels, SIZE[0] // stride, SIZE[1] // stride)
        torch.testing.assert_close(found, wanted)
    sum(each.square().sum() for each in maps).backward()
    assert [key for key, each in backbone.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_chosen_outputs_are_normalized_over_their_channels(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(body(name).double(), norms=(0,)).double()
    norm: Any = backbone.norms["0"]
    norm.weight.data.uniform_(), norm.bias.data.uniform_()
    images = torch.randn(1, 3, *SIZE).double()
    found = backbone(images)[0]
    backbone.norms = nn.ModuleDict()
    raw = backbone(images)[0].permute(0, 2, 3, 1)
    wanted = F.layer_norm(raw, raw.shape[3:], norm.weight, norm.bias, 1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_convolutional_network_has_the_maps_from_stride_4_up() -> None:
    backbone = Backbone(timm.create_model("test_resnet"))
    assert backbone.strides == [4, 8, 16, 32]
    assert [each.shape[2:] for each in backbone(torch.randn(1, 3, 64, 96))][-1] == (2, 3)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_a_model_for_one_size_is_refused_and_its_open_arguments_are_found(name: str) -> None:
    with without_memory():
        with pytest.raises(UnsupportedModelError):
            Backbone(create_timm_model(name))
        Backbone(create_timm_model(name, **any_size_arguments(name)))


def test_what_gives_no_maps_or_has_no_such_output_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        Backbone(nn.Linear(2, 2))
    for name in ("beit_base_patch16_224", "maxvit_tiny_tf_224", "no_such_model"):
        with pytest.raises(UnsupportedModelError):
            any_size_arguments(name)
    with pytest.raises(ConfigError):
        Backbone(body("pvt"), norms=(4,))


def test_pyramids_need_no_argument_for_any_size() -> None:
    assert any_size_arguments("pvt_v2_b0") == {}


def lit_layer() -> Any:
    """Return the layer of stage 3 of a tiny LIT-S in float64, whose bias is of a grid of 14 x 14."""
    layer: Any = next(iter(converted_layers(body("lit_s").double()).values()))
    torch.nn.init.normal_(layer.relative_position_bias_table)
    return layer


def attention(layer: Any, x_BHWC: Tensor) -> Tensor:
    """Restate softmax attention with the bias of the whole grid, its table resampled by plain bicubic."""
    rows, columns = x_BHWC.shape[1:3]
    side = math.isqrt(len(layer.relative_position_bias_table))
    table = layer.relative_position_bias_table.T.unflatten(1, (side, side))[None]
    table = F.interpolate(table, size=(2 * rows - 1, 2 * columns - 1), mode="bicubic", align_corners=False)[0]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    apart = places[:, None] - places + torch.tensor([rows - 1, columns - 1])
    bias = table[:, apart[..., 0], apart[..., 1]]
    q, k, v = layer.qkv(x_BHWC.flatten(1, 2)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    out: Tensor = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    return out.unflatten(1, (rows, columns))


@pytest.mark.parametrize("grid", [(14, 14), (6, 10), (17, 5)])
def test_the_bias_of_lit_is_resampled_for_images_of_another_size(grid: tuple[int, int]) -> None:
    layer = lit_layer()
    tokens = torch.randn(2, *grid, layer.qkv.in_features).double()
    wanted = attention(layer, tokens)
    with torch.no_grad():
        torch.testing.assert_close(layer(tokens), wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer(tokens), wanted, rtol=1e-9, atol=1e-9)
    found = layer(tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    gradients = [
        torch.autograd.grad(each.square().sum(), layer.relative_position_bias_table)[0]
        for each in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_the_resampled_bias_of_lit_follows_its_table() -> None:
    layer = lit_layer()
    tokens = torch.randn(1, 6, 10, layer.qkv.in_features).double()
    with torch.no_grad():
        layer(tokens)
        layer.relative_position_bias_table.mul_(2)
        torch.testing.assert_close(layer(tokens), attention(layer, tokens), rtol=1e-9, atol=1e-9)
