"""PVT has the published sizes, computes its equations, and has the interface of timm's models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from graftvit.models import pvt_models
from graftvit.models.cost import attention_macs
from graftvit.models.errors import ConfigError
from graftvit.models.small import without_memory
from support.models.pyramids import images, tiny
from torch import Tensor

PUBLISHED = {"pvt_tiny": 13.2, "pvt_small": 24.5, "pvt_medium": 44.2, "pvt_large": 61.4}
"""Millions of parameters in table 1 of the paper."""
SIZE = (32, 32)


def count(depths: tuple[int, ...], reductions: tuple[int, ...]) -> int:
    """Return the parameters by hand, for 1,000 classes at 224 x 224."""
    total, before, patch, tokens = 0, 3, 4, 56 * 56
    for width, ratio, depth, reduction in zip(
        (64, 128, 320, 512), (8, 8, 4, 4), depths, reductions, strict=True
    ):
        total += patch**2 * before * width + width + 2 * width + tokens * width
        block = 4 * width * (width + 1) + 2 * ratio * width**2 + ratio * width + width + 4 * width
        block += reduction**2 * width**2 + 3 * width if reduction > 1 else 0
        total += depth * block
        before, patch, tokens = width, 2, tokens // 4
    return total + 2 * 512 + 2 * 512 + 513 * 1000


def test_counts_to_the_integer() -> None:
    rows = [
        line.strip("| ").split("|") for line in (pvt_models.__doc__ or "").splitlines() if "| pvt_" in line
    ]
    assert [row[0].strip() for row in rows] == list(pvt_models.default_cfgs)
    for name, depths, parameters in ([cell.strip() for cell in row] for row in rows):
        with without_memory():
            found = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        by_hand = count(tuple(map(int, depths.split(","))), (1,) * 4 if "full" in name else (8, 4, 2, 1))
        assert f"{found:,}" == parameters == f"{by_hand:,}"
        assert name not in PUBLISHED or round(found / 1e6, 1) == PUBLISHED[name]


def dense(model: Any, x: Tensor) -> Tensor:
    """Return the logits by the equations of the paper, one step a line."""
    state = model.state_dict()

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        normed = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def patches(x: Tensor, name: str, eps: float) -> Tensor:
        """Cut (B, H, W, C) into squares, and project and normalize each."""
        projection = name.replace("norm", "sr" if "attn" in name else "proj")
        weight, bias = state[f"{projection}.weight"], state[f"{projection}.bias"]
        side = weight.shape[2]
        cut = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # B, h, side, w, side, C
        return norm(torch.einsum("bhiwjc,dcij->bhwd", cut, weight) + bias, name, eps)

    for i, stage in enumerate(model.stages):
        x = patches(x, f"stages.{i}.downsample.norm" if i else "patch_embed.norm", 1e-5)
        rows, columns = x.shape[1:3]
        x = x.flatten(1, 2)
        if i == len(model.stages) - 1:
            x = torch.cat([state[f"stages.{i}.cls_token"].expand(len(x), 1, -1), x], 1)
        x = x + state[f"stages.{i}.pos_embed"]
        for j in range(len(stage.blocks)):
            name = f"stages.{i}.blocks.{j}"
            y = norm(x, f"{name}.norm1", 1e-6)
            reduced = (
                patches(y.unflatten(1, (rows, columns)), f"{name}.attn.norm", 1e-5).flatten(1, 2)
                if f"{name}.attn.sr.weight" in state
                else y
            )
            heads, width = i + 1, x.shape[-1]
            q = linear(y, f"{name}.attn.q").unflatten(2, (heads, -1)).transpose(1, 2)
            k, v = linear(reduced, f"{name}.attn.kv").unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
            maps = (q @ k.transpose(2, 3) * (width // heads) ** -0.5).softmax(-1)
            x = x + linear((maps @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
            hidden = torch.nn.functional.gelu(linear(norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1"))
            x = x + linear(hidden, f"{name}.mlp.fc2")
        x = x if i == len(model.stages) - 1 else x.unflatten(1, (rows, columns))
    return linear(norm(x, "norm", 1e-6)[:, 0], "head")


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_logits_are_the_papers(size: tuple[int, int]) -> None:
    model = tiny("pvt1", size).double()
    inputs = images(size).double()
    torch.testing.assert_close(
        model(inputs), dense(model, inputs.permute(0, 2, 3, 1)), rtol=1e-10, atol=1e-10
    )


def test_the_maps_of_the_stages_are_timms_features() -> None:
    model: Any = tiny("pvt1")
    tokens, maps = model.forward_intermediates(images(SIZE), norm=True)
    assert [tuple(each.shape) for each in maps] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert torch.equal(model.forward_head(tokens), model(images(SIZE)))
    [first] = model.forward_intermediates(images(SIZE), [0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])
    features = timm.create_model("pvt_tiny", features_only=True, img_size=64, out_indices=(1, 3))
    assert [tuple(each.shape) for each in features(torch.zeros(1, 3, 64, 64))] == [
        (1, 128, 8, 8),
        (1, 512, 2, 2),
    ]
    assert features.feature_info.channels() == [128, 512]


def test_positions_are_resampled_for_another_size_in_a_call_or_for_good() -> None:
    model: Any = tiny("pvt1")
    inputs = images((40, 48))
    passing = model(inputs)
    model.set_input_size((40, 48))
    assert model.stages[1].pos_embed.shape == (1, 1 + 5 * 6, 16)
    assert torch.equal(model(inputs), passing)


def test_a_mean_instead_of_a_class_token() -> None:
    model: Any = tiny("pvt1", global_pool="avg", sr_ratios=(2, 2))
    assert model.num_prefix_tokens == 0
    features = model.forward_features(images(SIZE))
    assert torch.equal(model(images(SIZE)), model.head(features.mean(1)))
    assert not model.no_weight_decay()
    assert tiny("pvt1").no_weight_decay() == {"stages.1.cls_token"}  # type: ignore[operator]


def test_attention_of_a_stage_with_a_class_token_counts_it() -> None:
    tokens, pairs = 4 * 4 + 1, 8 * 8 * 4 * 4
    assert attention_macs(tiny("pvt1")) == [2 * pairs * 8, 2 * tokens**2 * 16, 2 * tokens**2 * 16]


def test_layer_groups_follow_the_depth() -> None:
    model: Any = tiny("pvt1")
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["patch_embed.proj.weight"] == 0
    assert groups["stages.0.blocks.0.norm1.weight"] < groups["stages.1.pos_embed"]
    assert groups["stages.1.pos_embed"] == groups["stages.1.blocks.0.norm1.weight"]
    assert groups["norm.weight"] < groups["head.weight"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sr_ratios=\(2, 2\): the last stage has a class token"):
        tiny("pvt1", sr_ratios=(2, 2))
    with pytest.raises(ConfigError, match="mlp_ratios has values for 3 stages, and depths for 2"):
        tiny("pvt1", mlp_ratios=(2, 2, 2))
    with pytest.raises(ConfigError, match="global_pool='max'; valid are token and avg"):
        tiny("pvt1", global_pool="max")
    model: Any = tiny("pvt1")
    with pytest.raises(ConfigError, match="global_pool='avg'; this model was built with token"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ConfigError, match="output_fmt='NLC'; valid is NCHW"):
        model.forward_intermediates(images(SIZE), output_fmt="NLC")
