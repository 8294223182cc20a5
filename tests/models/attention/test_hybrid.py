"""Hybrid attention against its two equations, written with dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads, LayerShape, Sparse
from graftvit.models.attention.hybrid import HybridAttention
from graftvit.models.attention.softmax import SoftmaxAttention
from graftvit.models.attention.window import WindowAttention
from graftvit.models.errors import ConfigError
from support.models.operator_cases import Case, draw
from torch import Tensor

GEOMETRY = Geometry(2, (7, 9))
SHAPE = LayerShape(2, 8, GEOMETRY)


def seen(window: int, dilation: int) -> Tensor:
    """Who sees whom: where a window's map is not zero."""
    return WindowAttention(SHAPE, window, dilation).matrix(draw(GEOMETRY))[0, 0] > 0


def kernel_pairs(heads: Heads) -> Tensor:
    q, k, _ = heads.qkv()
    return (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(2, 3)


def test_joint_is_one_normalizer_over_what_is_inside_and_outside() -> None:
    operator: Any = Case("hybrid", {"combine": "joint", "window": 4}).build(GEOMETRY)
    heads = draw(GEOMETRY)
    q, k, v = heads.qkv()
    inside = seen(4, 1) | seen(4, 2)
    logits = (heads.scale * q @ k.transpose(2, 3)).masked_fill(~inside, -torch.inf)
    exact = operator.inside.sigmoid() * (logits - logits.amax(-1, keepdim=True)).exp()
    weights = torch.where(inside, exact, kernel_pairs(heads))
    wanted = weights @ v / weights.sum(-1, keepdim=True)
    softmax = SoftmaxAttention(SHAPE)(heads)
    out = operator(heads)
    torch.testing.assert_close(out[:, :, 2:], wanted[:, :, 2:], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out[:, :, :2], softmax[:, :, :2], rtol=1e-9, atol=1e-11)


def test_gate_mixes_the_maps_of_the_branches_by_the_query() -> None:
    operator: Any = Case("hybrid", {"window": 4}).build(GEOMETRY)
    heads = draw(GEOMETRY)
    q, _, v = heads.qkv()
    kernel = kernel_pairs(heads)
    branches = [WindowAttention(SHAPE, 4, dilation).matrix(heads) for dilation in (1, 2)]
    branches.append(kernel / kernel.sum(-1, keepdim=True))
    gates = torch.einsum("bhnd,hdc->bhnc", q, operator.gate_weight) + operator.gate_bias
    wanted = torch.einsum("bhnc,cbhnm,bhmd->bhnd", gates.softmax(-1), torch.stack(branches), v)
    torch.testing.assert_close(operator(heads)[:, :, 2:], wanted[:, :, 2:], rtol=1e-5, atol=1e-6)


def test_windows_are_dominant_at_the_start() -> None:
    heads = draw(GEOMETRY)
    operator = HybridAttention(SHAPE, window=4).double()
    *windows, kernel = operator._gates(heads)
    for gate in windows:
        torch.testing.assert_close(gate / kernel, torch.full_like(gate, 9.0), rtol=1e-3, atol=0)
    joint = HybridAttention(SHAPE, combine="joint")
    torch.testing.assert_close(joint.inside.sigmoid(), torch.full((2, 1, 1), 0.1), rtol=1e-3, atol=0)


def test_joint_with_a_window_as_large_as_the_grid_is_softmax_attention() -> None:
    heads = draw(GEOMETRY)
    operator: Any = Case("hybrid", {"combine": "joint", "window": 9}).build(GEOMETRY)
    torch.testing.assert_close(operator(heads), SoftmaxAttention(SHAPE)(heads), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_gradients_are_those_of_finite_differences(combine: str) -> None:
    geometry = Geometry(1, (3, 4))
    operator: Any = Case("hybrid", {"combine": combine, "window": 2}).build(geometry, heads=1, width=2)
    heads = draw(geometry, batch=1, heads=1, width=2)
    inputs = tuple(x.requires_grad_() for x in heads.qkv())
    assert torch.autograd.gradcheck(lambda *qkv: operator(heads.with_qkv(*qkv)), inputs)


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_another_grid_is_met_on_the_way_and_resampled_to(combine: str) -> None:
    other = Geometry(1, (5, 6))
    heads, case = draw(other), Case("hybrid", {"combine": combine, "window": 3})
    operator, wanted = case.build(GEOMETRY), case.build(other)(heads)
    torch.testing.assert_close(operator(heads), wanted)
    operator.resample(other)
    torch.testing.assert_close(operator(heads), wanted)
    assert sum(isinstance(term, Sparse) for term in operator.terms(heads)) == 2


def test_cost_is_the_sum_of_its_branches() -> None:
    geometry = Geometry(1, (14, 14))
    shape = LayerShape(3, 64, geometry)
    kernel = 197 * (2 * 64 * 64 + 64) * 3
    local = 2 * (197 + 2 * 196 * 50) * 64 * 3
    assert HybridAttention(shape).macs(geometry) == local + kernel + 196 * 64 * 3 * 3
    joint = HybridAttention(shape, combine="joint").macs(geometry)
    assert joint == local + kernel + 2 * 196 * 50 * 64 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "gates"}, "plan: combine=gates; did you mean 'gate'"),
        ({"branches": "window+kernl"}, "'kernl'; did you mean 'kernel'"),
        ({"branches": "kernel"}, "two or three different ones"),
        ({"branches": "window+window"}, "two or three different ones"),
        ({"branches": "window+dilated", "combine": "joint"}, "combine=joint needs the kernel"),
        ({"window": 0}, "window=0"),
        ({"feature": "reluu"}, "did you mean 'relu'"),
    ],
)
def test_options_that_are_none_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        HybridAttention(SHAPE, **options)
