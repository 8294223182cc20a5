"""Conversion against dense float64 attention, and through timm's own factory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import ConfigError, UnsupportedModelError
from graftvit.models.host import host_attention, release_attention
from safetensors.torch import load_model, save_model

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 3,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 24)


def vit(**more: Any) -> torch.nn.Module:
    return timm.create_model(NAME, **{**SMALL, **more}).eval()


def test_a_plan_changes_the_layers_that_it_names_and_nothing_else() -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    student = convert(model, "1: linear")
    assert plan_of(model) is None
    assert plan_of(student) == "0: softmax; 1: linear; 2: softmax"
    after = student.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert after.keys() - before.keys() == {"blocks.1.attn.operator.choice"}
    first: Any = student
    assert torch.equal(first.blocks[0](torch.ones(1, 25, 16)), model.blocks[0](torch.ones(1, 25, 16)))  # type: ignore[operator, index]
    assert not torch.allclose(student(IMAGES), model(IMAGES))
    student(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_converted_layer_is_its_equation_in_the_model() -> None:
    student: Any = convert(vit(), "*: linear")
    layer, tokens = student.blocks[0].attn, torch.randn(2, 25, 16)
    q, k, v = layer.original.qkv(tokens).reshape(2, 25, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    weights = q @ k.transpose(2, 3)
    dense = (weights / weights.sum(-1, keepdim=True)) @ v
    expected = layer.original.proj(dense.transpose(1, 2).reshape(2, 25, 16))
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-4, atol=1e-5)


def test_keeping_every_layer_gives_the_same_logits() -> None:
    model = vit()
    assert torch.equal(convert(model, "*: keep")(IMAGES), model(IMAGES))


def test_converting_again_starts_from_the_softmax_layers() -> None:
    model = vit()
    again = convert(convert(model, "*: linear"), "*: softmax")
    assert plan_of(again) is None
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_timm_builds_and_saves_a_converted_model(tmp_path: Any) -> None:
    student = convert(vit(), "*: linear; 2: softmax")
    save_model(student, str(tmp_path / "w.safetensors"))
    again = timm.create_model("graftvit_converted", architecture=NAME, plan=plan_of(student), **SMALL).eval()
    load_model(again, str(tmp_path / "w.safetensors"))
    assert torch.equal(again(IMAGES), student(IMAGES))
    assert copy.deepcopy(again).state_dict().keys() == student.state_dict().keys()


def test_converted_layers_are_no_temporary_hosts() -> None:
    student = convert(vit(), "0: linear")
    assert plan_of(release_attention(student)) == plan_of(student) is not None
    layer = student.blocks[0].attn  # type: ignore[index, union-attr]
    assert host_attention(student)[0] is layer
    assert release_attention(student).blocks[0].attn is layer  # type: ignore[index, union-attr]


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown operator 'linaer'; did you mean 'linear'"):
        convert(vit(), "*: linaer")
    with pytest.raises(ConfigError, match="linear has no option 'featur'; did you mean 'feature'"):
        convert(vit(), "*: linear(featur=relu)")
    with pytest.raises(ConfigError, match="plan: feature=gelu; did you mean 'elu'"):
        convert(vit(), "*: linear(feature=gelu)")
    with pytest.raises(ConfigError, match="softmax has no option 'x'; it has none"):
        convert(vit(), "*: softmax(x=1)")
    beit = timm.create_model("beit_base_patch16_224", **{**SMALL, "img_size": 16})
    with pytest.raises(UnsupportedModelError, match="layer 0 has a relative position bias"):
        convert(beit, "0: linear")
    with pytest.raises(UnsupportedModelError, match="ResNet is not a supported model"):
        convert(timm.create_model("resnet10t"), "0: linear")
