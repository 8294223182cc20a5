"""Deformable merging is its equation, and any pyramid takes it by its plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models import token_merging
from graftvit.models.conversion import convert, plan_of, plan_size, resize
from graftvit.models.cost import other_macs
from graftvit.models.errors import ConfigError
from graftvit.models.families import sites
from graftvit.models.merges import merge_layers, merges_deformably
from graftvit.models.token_merging import (
    DeformableConv2d,
    TokenMerging,
    convolve_at,
    convolve_samples,
    tap_places,
)
from support.models.pyramids import TINY, arguments, images, tiny
from torch import Tensor, nn

SIZES = [(8, 8), (6, 10), (7, 9), (2, 2), (3, 5)]
OFFSETS = [0.0, 0.7, 3.0, 9.0]
Path = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
PATHS = pytest.mark.parametrize("path", [convolve_at, convolve_samples])


def case(size: tuple[int, int], scale: float, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input, offsets, weight and bias in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 3, *size), (batch, 8, size[0] // 2, size[1] // 2), (5, 3, 2, 2), (5,)]
    x, offsets, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, scale * offsets, weight, bias


def pixel(x_CHW: Tensor, row: float, column: float) -> Tensor:
    """Return the bilinear value (C,) at a place, zero outside, from single pixels."""
    top, left = math.floor(row), math.floor(column)
    value = x_CHW.new_zeros(len(x_CHW))
    for y in (top, top + 1):
        for x in (left, left + 1):
            if 0 <= y < x_CHW.shape[1] and 0 <= x < x_CHW.shape[2]:
                value = value + (1 - abs(row - y)) * (1 - abs(column - x)) * x_CHW[:, y, x]
    return value


def scalar(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the merge, one output pixel at a time."""
    out = torch.zeros(len(x), len(weight), *offsets.shape[2:], dtype=x.dtype)
    for b in range(out.shape[0]):
        for y in range(out.shape[2]):
            for x_ in range(out.shape[3]):
                total = bias.clone()
                for i in (0, 1):
                    for j in (0, 1):
                        tap = 2 * i + j
                        dy, dx = float(offsets[b, 2 * tap, y, x_]), float(offsets[b, 2 * tap + 1, y, x_])
                        total += weight[:, :, i, j] @ pixel(x[b], 2 * y + i + dy, 2 * x_ + j + dx)
                out[b, :, y, x_] = total
    return out


@PATHS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", OFFSETS)
def test_a_merge_is_its_equation(path: Path, size: tuple[int, int], scale: float) -> None:
    for batch in (1, 5):
        given = case(size, scale, batch)
        torch.testing.assert_close(path(*given), scalar(*given), rtol=1e-12, atol=1e-12)


@PATHS
def test_places_at_the_border_are_bilinear_with_zeros(path: Path) -> None:
    x, offsets, weight, bias = case((4, 4), 0.0, 1)
    for row in (-1.0, -0.5, 3.0, 3.5, 4.0):
        moved = offsets.clone()
        moved[:, 0] = row - 2 * torch.arange(2.0)[:, None]  # the first tap reads this row
        torch.testing.assert_close(path(x, moved, weight, bias), scalar(x, moved, weight, bias))


@PATHS
def test_without_offsets_it_is_a_convolution(path: Path) -> None:
    x, offsets, weight, bias = case((7, 9), 0.0)
    torch.testing.assert_close(path(x, offsets, weight, bias), F.conv2d(x, weight, bias, 2))
    torch.testing.assert_close(path(x, offsets, weight, None), F.conv2d(x, weight, None, 2))


@PATHS
def test_gradients(path: Path) -> None:
    given = tuple(each.requires_grad_() for each in case((5, 4), 0.7, 2))
    assert torch.autograd.gradcheck(path, given)


def test_places_are_rows_and_columns_of_the_taps() -> None:
    offsets = torch.zeros(1, 8, 2, 3)
    offsets[0, 5] = 0.25  # dx of the third tap
    places = tap_places(offsets)
    assert places[0, :, :, 1, 2].tolist() == [[2, 4], [2, 5], [3, 4.25], [3, 5]]


def test_offsets_start_at_zero_and_learn() -> None:
    torch.manual_seed(0)
    merging = TokenMerging(4, 6)
    images = torch.randn(2, 4, 8, 8)
    plain = F.conv2d(images, merging.dconv.weight, merging.dconv.bias, 2)
    assert torch.equal(merging.dconv.conv_offset.weight, torch.zeros(8, 4, 2, 2))
    torch.testing.assert_close(merging.dconv(images), plain)
    optimizer = torch.optim.SGD(merging.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (merging(images) - 1).square().mean().backward()
        optimizer.step()
    assert merging.dconv.conv_offset.weight.abs().max() > 0
    assert merging.dconv.conv_offset.bias.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = DeformableConv2d(4, 6)
    torch.nn.init.normal_(conv.conv_offset.weight, std=0.3)
    images = torch.randn(3, 4, 8, 8)
    with torch.autocast("cpu", dtype):
        assert torch.equal(conv(images), conv(images.float()))
        found = conv(images.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, conv(images.to(dtype).float()).to(dtype))
    conv.to(dtype)
    assert conv(images.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype):
        conv(images).sum().backward()
    assert conv.conv_offset.weight.grad is not None


def test_a_device_without_the_operator_has_the_other_path(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case((6, 6), 0.7)
    expected = convolve_at(*given)
    monkeypatch.setattr(token_merging, "deform_conv2d", None)
    with pytest.raises(TypeError):
        convolve_at(*given)
    monkeypatch.setattr(token_merging, "HAS_OPERATOR", ())
    torch.testing.assert_close(convolve_at(*given), expected)


def test_an_exported_merge_has_no_operator_of_torchvision() -> None:
    merging = TokenMerging(4, 6).eval()
    torch.nn.init.normal_(merging.dconv.conv_offset.weight, std=0.5)
    images = torch.randn(2, 4, 7, 8)
    graph = torch.export.export(merging, (images,))
    assert "torchvision" not in str(graph.graph)
    torch.testing.assert_close(graph.module()(images), merging(images))


@pytest.mark.slow
def test_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    merging = TokenMerging(4, 6).eval()
    torch.nn.init.normal_(merging.dconv.conv_offset.weight, std=0.5)
    images = torch.randn(2, 4, 7, 8)
    program = torch.onnx.export(merging, (images,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    [found] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), merging(images), rtol=1e-4, atol=1e-5)


# `merge: deformable` in a plan: any pyramid takes it, at any size, and is saved and loaded as its plan says.


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
