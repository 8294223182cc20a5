"""The walk through a model finds every block of every family, with its tokens and heads."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from graftvit.models.errors import UnsupportedModelError
from graftvit.models.families import check_supported, depths, is_pyramid, sites
from graftvit.models.host import host_attention
from support.models.pyramids import SIZES, TINY, images, tiny
from torch import nn


def seen_shapes(model: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return tokens and width of the output of each block, as a forward pass has them."""
    shapes: list[tuple[int, int]] = []

    def see(module: nn.Module, given: Any, out: torch.Tensor) -> None:
        shapes.append((out[0, ..., 0].numel(), out.shape[-1]))

    for site in sites(model):
        site.block(model).register_forward_hook(see)
    with torch.no_grad():
        model(images(size))
    return shapes


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", TINY)
def test_sites_are_what_runs(kind: str, size: tuple[int, int]) -> None:
    model = tiny(kind, size)
    found = sites(model)
    assert seen_shapes(model, size) == [(site.shape.geometry.num_tokens, site.width) for site in found]
    assert [site.index for site in found] == list(range(sum(depths(model))))
    assert [site.stage for site in found] == [
        s for s, depth in enumerate(depths(model)) for _ in range(depth)
    ]
    assert [site.shape.num_heads for site in found] == [site.stage + 1 for site in found]
    assert all(site.num_heads * site.head_dim == site.width for site in found)
    assert is_pyramid(model)


def test_a_plain_model_has_one_stage() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    assert depths(model) == [2]
    assert [site.path for site in sites(model)] == ["blocks.0", "blocks.1"]
    assert sites(model)[1].shape.geometry.num_prefix == 1
    assert not is_pyramid(model)


def test_a_model_of_no_family_is_refused_and_has_no_empty_list() -> None:
    with pytest.raises(UnsupportedModelError, match="ResNet is not a supported model"):
        sites(timm.create_model("resnet10t"))


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_what_knows_plain_models_alone_refuses_a_pyramid_by_name(kind: str) -> None:
    model = tiny(kind)
    check_supported(model, pyramids=True)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} is a pyramid"):
        check_supported(model)
    with pytest.raises(UnsupportedModelError, match="is a pyramid"):
        host_attention(model)


def test_a_pyramid_with_another_attention_is_refused() -> None:
    model = tiny("swin")
    sites(model)[1].block(model).attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"block 1 of SwinTransformer is a .* with Identity"):
        check_supported(model, pyramids=True)
