"""Any timm model gives maps of images of any size, and keeps no parameter that no map needs."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.dense.backbone import Backbone, any_size_arguments
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.families import create_timm_model
from graftvit.models.small import without_memory
from support.models.dense_bodies import BODIES, body
from torch import nn

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


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "lit_s"])
def test_a_model_for_one_size_is_refused_and_its_open_arguments_are_found(name: str) -> None:
    with without_memory():
        with pytest.raises(UnsupportedModelError):
            Backbone(create_timm_model(name))
        Backbone(create_timm_model(name, **any_size_arguments(name)))


def test_what_gives_no_maps_or_has_no_such_output_is_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        Backbone(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError):
        any_size_arguments("maxvit_tiny_tf_224")
    with pytest.raises(ConfigError):
        Backbone(body("pvt"), norms=(4,))


def test_pyramids_need_no_argument_for_any_size() -> None:
    assert any_size_arguments("pvt_v2_b0") == {}
