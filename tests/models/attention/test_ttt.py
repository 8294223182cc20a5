"""TTT-SwiGLU against its definition by autograd, and what its normalized keys and its convolution change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.ttt import TTTAttention, normalized_keys
from support.models.operator_cases import Case, draw
from torch import Tensor

SMALL = Geometry(2, (3, 5))


def inner(x: Tensor, weights: list[Tensor]) -> Tensor:
    return (F.silu(x @ weights[0]) * (x @ weights[1])) @ weights[2]


def by_autograd(operator: TTTAttention, heads: Heads) -> Tensor:
    """The definition: one step of gradient descent, image by image, with autograd's gradient."""
    q, k, v = heads.qkv()
    keys = (k - k.mean(2, keepdim=True)) / (k.var(2, correction=0, keepdim=True) + 1).sqrt()
    outs = []
    for image in range(len(q)):
        weights = [w.detach().requires_grad_() for w in (operator.gated, operator.linear, operator.out)]
        objective = -(v[image] * inner(keys[image], weights)).sum() * heads.scale / q.shape[2]
        gradients = torch.autograd.grad(objective, weights)
        learned = [w - g for w, g in zip(weights, gradients, strict=True)]
        outs.append(inner(q[image], learned))
    return torch.stack(outs)


def without_convolution(geometry: Geometry, size: float = 1.0) -> TTTAttention:
    operator = TTTAttention(LayerShape(2, 8, geometry)).double()
    for weight in (operator.gated, operator.linear, operator.out):
        torch.nn.init.normal_(weight, std=0.3 * size)
    return operator


def test_the_closed_form_is_the_step() -> None:
    operator, heads = without_convolution(SMALL), draw(SMALL)
    torch.testing.assert_close(operator(heads), by_autograd(operator, heads), rtol=1e-10, atol=1e-12)


def test_the_convolution_starts_at_zero_and_is_of_the_neighbors() -> None:
    operator, heads = without_convolution(SMALL), draw(SMALL)
    q, k, v = heads.qkv()
    with torch.no_grad():
        operator.q_conv.weight[:, 0, 1, 2] = 1.0  # each channel gains that of the token to its right
    image = q[:, :, 2:].unflatten(2, (3, 5))
    shifted = F.pad(image, (0, 0, 0, 1))[:, :, :, 1:].flatten(2, 3)
    moved = torch.cat((q[:, :, :2], q[:, :, 2:] + shifted), 2)
    wanted = by_autograd(operator, heads.with_qkv(moved, k, v))
    torch.testing.assert_close(operator(heads), wanted, rtol=1e-10, atol=1e-12)


def test_a_common_mean_of_the_keys_changes_nothing() -> None:
    operator, heads = without_convolution(SMALL), draw(SMALL)
    q, k, v = heads.qkv()
    shifted = operator(heads.with_qkv(q, k + 5 * torch.ones(8), v))
    torch.testing.assert_close(shifted, operator(heads), rtol=1e-9, atol=1e-11)


def test_small_deviations_of_keys_are_not_blown_up() -> None:
    keys = torch.randn(1, 1, 500, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0]) + 7
    deviations = normalized_keys(keys).std(2)[0, 0]
    assert deviations[0] < 2e-3
    assert 0.6 < deviations[1] < 0.8
    assert 0.99 < deviations[2] < 1.01


def test_parameters_and_cost_are_those_of_the_paper() -> None:
    shape = LayerShape(3, 64, Geometry(0, (14, 14)))  # DeiT-T
    operator = TTTAttention(shape)
    assert sum(p.numel() for p in operator.parameters()) == 3 * 3 * 64**2 + 18 * 3 * 64
    # DeiT-T without a class token: 12 layers change 1.25 G of softmax to 1.34 G
    softmax = 2 * 196**2 * 64 * 3
    gained = 12 * (operator.macs(shape.geometry) - softmax)
    assert 0.06e9 < gained < 0.12e9


def test_the_answer_depends_on_values_by_more_than_a_map() -> None:
    operator, heads = Case("ttt").build(SMALL), draw(SMALL)
    q, k, v = heads.qkv()
    double = operator(heads.with_qkv(q, k, 2 * v))
    assert not torch.allclose(double, 2 * operator(heads), rtol=1e-3)
