"""A hosted pyramid is timm's: logits and gradients in float64, in every mode and at every size."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from graftvit.models.families import sites
from graftvit.models.grid_hosts import GridHost, host_layers, release_layers
from support.models.pyramids import SIZES, TINY, images, tiny
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn


def hosted(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    host_layers(twin)
    return twin


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model(inputs).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", TINY)
def test_hosted_logits_and_gradients_are_timms(kind: str, size: tuple[int, int]) -> None:
    model, inputs = tiny(kind, size).double(), images(size).double()
    twin = hosted(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    exact = {"rtol": 0, "atol": 0} if kind.startswith("pvt") else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(twin(inputs), model(inputs), **exact)
    expected, found = gradients(model, inputs), gradients(twin, inputs)
    assert expected.keys() == found.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", TINY)
def test_training_with_dropped_paths_is_timms(kind: str) -> None:
    model = tiny(kind, drop_path_rate=0.5).double().train()
    twin, outputs = hosted(model), []
    for each in (model, twin):
        torch.manual_seed(3)
        outputs.append(each(images((32, 32)).double()))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", TINY)
def test_bfloat16_by_autocast_is_timms_to_rounding(kind: str) -> None:
    model, inputs = tiny(kind), images((32, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hosted(model)(inputs), model(inputs), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
@pytest.mark.parametrize(
    "more", [{"always_partition": True}, {"dynamic_img_size": True}, {"qkv_bias": False}]
)
def test_the_variants_of_swin_are_timms(kind: str, more: dict[str, Any]) -> None:
    model = tiny(kind, (40, 24), **more).double()
    size = (24, 40) if "dynamic_img_size" in more else (40, 24)
    inputs = images(size).double()
    torch.testing.assert_close(hosted(model)(inputs), model(inputs), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", TINY)
def test_release_puts_timms_layers_back(kind: str) -> None:
    model = tiny(kind)
    types, expected = [type(module) for module in model.modules()], model(images((32, 32)))
    hosts = host_layers(model)
    assert hosts == host_layers(model), "a layer that has a host keeps it"
    assert all(isinstance(site.block(model).attn, GridHost) for site in sites(model))
    release_layers(model)
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(model(images((32, 32))), expected)


def test_a_hosted_swin_is_resized_as_timm_does() -> None:
    model, bigger = tiny("swin").double(), (48, 64)
    twin = hosted(model)
    for each in (model, twin):
        each.set_input_size(bigger)  # type: ignore[operator]
    inputs = images(bigger).double()
    torch.testing.assert_close(twin(inputs), model(inputs), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(release_layers(twin)(inputs), model(inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    "block", [swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block]
)
def test_timms_blocks_of_swin_have_what_ours_replace(block: Any) -> None:
    assert list(inspect.signature(block._attn).parameters) == ["self", "x"]
    assert list(inspect.signature(block.set_input_size).parameters) == [
        "self",
        "feat_size",
        "window_size",
        "always_partition",
    ]
    assert inspect.getsource(block.forward).count("self._attn(") == 1
    assert "self.attn(" not in inspect.getsource(block.forward)
    assert {"window_size", "shift_size", "dynamic_mask"} <= vars(
        sites(tiny("swin"))[0].block(tiny("swin"))
    ).keys()
