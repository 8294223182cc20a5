"""`merge: deformable` in a plan: any pyramid takes it, at any size, and is saved and loaded as its plan says."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from graftvit.models.conversion import convert, plan_of, plan_size, resize
from graftvit.models.cost import other_macs
from graftvit.models.errors import ConfigError
from graftvit.models.families import sites
from graftvit.models.merges import merge_layers, merges_deformably
from support.models.pyramids import TINY, arguments, images, tiny
from torch import nn

PLAN = "stage1: none; merge: deformable"


def rebuilt(student: nn.Module, kind: str, size: tuple[int, int]) -> nn.Module:
    again = timm.create_model(
        "graftvit_converted", architecture=TINY[kind][0], plan=plan_of(student), plan_size=plan_size(student),
        **arguments(kind, size, img_size=size),
    )  # fmt: skip
    again.load_state_dict(student.state_dict())
    return again.eval()


@pytest.mark.parametrize("kind", TINY)
def test_any_pyramid_merges_deformably(kind: str) -> None:
    model, inputs = tiny(kind), images((32, 32))
    student = convert(model, PLAN)
    assert str(plan_of(student)).endswith("; merge: deformable")
    assert not merges_deformably(model)
    assert [merge.dconv.weight.shape for merge in merge_layers(student)] == [(16, 8, 2, 2)]
    student.train()(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    torch.optim.SGD(student.parameters(), 0.01).step()
    student.eval()
    assert torch.equal(rebuilt(student, kind, (32, 32))(inputs), student(inputs))
    again = convert(student, PLAN)
    assert torch.equal(again(inputs), student(inputs)), "a merge that is deformable stays"


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (kind, size)
        for kind in TINY
        for size in ((40, 24), (36, 44))
        if size == (40, 24) or kind not in ("svt", "pcpvt")  # timm's Twins wants whole patches in every stage
    ],
)
def test_sites_follow_merges_that_drop_an_odd_row(kind: str, size: tuple[int, int]) -> None:
    """36 x 44 pixels have 9 x 11 patches, of which a deformable merge makes 4 x 5."""
    student = convert(tiny(kind), "merge: deformable; stage2: softmax")
    resize(student, size)
    assert sites(student)[-1].shape.geometry.grid == (size[0] // 8, size[1] // 8)
    assert torch.equal(rebuilt(student, kind, size)(images(size)), student(images(size)))


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_windows_after_a_merge_are_those_of_its_grid(kind: str) -> None:
    student: Any = convert(tiny(kind, (36, 44)), "merge: deformable")
    assert student(images((36, 44))).shape == (2, 3)
    assert student.layers[1].blocks[0].input_resolution == (4, 5)


@pytest.mark.parametrize("kind", ["pvt", "pvt1", "svt", "swin"])
def test_fresh_weights_have_no_offsets(kind: str) -> None:
    student = convert(tiny(kind), PLAN, weights="none")
    assert all(merge.dconv.conv_offset.weight.abs().sum() == 0 for merge in merge_layers(student))


def test_a_merge_counts_its_convolutions() -> None:
    model = tiny("pvt1")
    plain, student = other_macs(model), other_macs(convert(model, "merge: deformable"))
    assert student - plain == 16 * 8 * 8 * 4  # 4 x 4 places, 8 offsets from 8 channels of 2 x 2 pixels


def test_words_for_merges() -> None:
    assert plan_of(convert(tiny("swin"), {"stage1": "none", "merge": "keep"})) == "0-1: none; 2-3: keep"
    with pytest.raises(ConfigError, match="plan: 'merge: deformabel'; did you mean 'deformable'"):
        convert(tiny("swin"), "merge: deformabel")
    plain = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    with pytest.raises(ConfigError, match="plan: 'merge: deformable' is for pyramids"):
        convert(plain, "*: linear; merge: deformable")
