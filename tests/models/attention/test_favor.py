"""FAVOR+: the estimate converges to softmax attention, and Ω is orthogonal, saved, and stays as it was drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graftvit.models.attention import features as favor
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.attention.features import Favor, default_features, orthogonal_features
from graftvit.models.attention.kernel import KernelAttention
from graftvit.models.attention.softmax import SoftmaxAttention
from support.models.operator_cases import draw
from torch import Tensor

GEOMETRY = Geometry(1, (4, 6))
SHAPE = LayerShape(2, 8, GEOMETRY)


def performer(num_features: int, **options: Any) -> Any:
    return KernelAttention(SHAPE, feature="favor", num_features=num_features, **options).double()


def test_features_are_an_unbiased_estimate_of_the_exponential() -> None:
    torch.manual_seed(0)
    feature: Any = Favor(SHAPE, num_features=80_000).double()
    q, k, _ = draw(GEOMETRY, size=0.35, batch=1).qkv()
    scale = SHAPE.head_dim**-0.5
    q_features, k_features = (feature._exponents(x, scale).exp() for x in (q, k))
    estimate = q_features @ k_features.transpose(2, 3) / 80_000
    torch.testing.assert_close(estimate, (scale * q @ k.transpose(2, 3)).exp(), rtol=0.05, atol=0)


def test_the_map_converges_to_softmax() -> None:
    heads = draw(GEOMETRY, size=0.5)
    target = SoftmaxAttention(SHAPE).matrix(heads)
    errors = []
    for num_features in (8, 256, 16_384):
        torch.manual_seed(1)
        errors.append(float((performer(num_features).matrix(heads) - target).norm() / target.norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.03


def test_orthogonal_rows_estimate_better_than_independent_ones() -> None:
    heads = draw(GEOMETRY)
    target = SoftmaxAttention(SHAPE).matrix(heads)

    def error(omega: Tensor) -> float:
        operator = performer(8)
        operator.feature.omega.copy_(omega)
        return float((operator.matrix(heads) - target).square().sum())

    torch.manual_seed(2)
    orthogonal = sum(error(orthogonal_features(8, 8)) for _ in range(100))
    independent = sum(error(torch.randn(8, 8)) for _ in range(100))
    assert orthogonal < independent


def test_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors() -> None:
    torch.manual_seed(0)
    omega = orthogonal_features(3000, 16)
    assert omega.shape == (3000, 16)
    lengths = omega.norm(dim=1)
    for block in (omega / lengths[:, None]).split(16):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=1e-5)
    assert float(lengths.square().mean()) == pytest.approx(16, rel=0.05)
    first = omega[::16, 0]  # of a plain QR, always negative
    assert float(first.mean().abs()) < 5 / len(first) ** 0.5
    assert float(lengths.var()) == pytest.approx(0.5, rel=0.2)  # of chi with 16 degrees, nearly


def test_forward_changes_nothing() -> None:
    operator, heads = performer(16), draw(GEOMETRY)
    omega = operator.feature.omega.clone()
    first = operator.train()(heads)
    torch.testing.assert_close(operator.eval()(heads), first, rtol=0, atol=0)
    assert torch.equal(operator.feature.omega, omega)
    assert omega.dtype == torch.float64


def test_a_saved_operator_is_the_same_operator() -> None:
    first, second, heads = performer(16), performer(16), draw(GEOMETRY)
    assert not torch.allclose(first(heads), second(heads))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(heads), second(heads), rtol=0, atol=0)
    assert not list(first.parameters())


def test_features_are_fewer_where_the_image_is_small() -> None:
    counts = [default_features(LayerShape(3, 64, Geometry(1, (side, side)))) for side in (7, 14, 24, 32, 64)]
    assert counts == [64, 64, 144, 256, int(64 * math.log(64))]
    shape = LayerShape(3, 64, Geometry(1, (14, 14)))
    assert KernelAttention(shape, feature="favor").macs(shape.geometry) < SoftmaxAttention(shape).macs(
        shape.geometry
    )


def test_same_map_as_performer_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the constant that both add to the exponential: with it they differ, as the next test says."""
    reference = pytest.importorskip("performer_pytorch.performer_pytorch")
    monkeypatch.setattr(favor, "EPSILON", 0.0)
    operator, heads = performer(24), draw(GEOMETRY)
    q, k, v = heads.qkv()
    omega = operator.feature.omega
    q, k = (
        reference.softmax_kernel(x, projection_matrix=omega, is_query=is_query, eps=0.0)
        for x, is_query in ((q, True), (k, False))
    )
    torch.testing.assert_close(operator(heads), reference.linear_attention(q, k, v), rtol=1e-9, atol=1e-11)


def test_the_added_constant_does_not_swamp_long_tokens_as_in_performer_pytorch() -> None:
    """It takes the largest Ω x out of the exponent and leaves −‖x‖²/2 in, so that all features of a long token fall
    below 1e-4 and its row becomes uniform; here the largest exponential is 1."""
    reference = pytest.importorskip("performer_pytorch.performer_pytorch")
    operator, heads = performer(24), draw(GEOMETRY, size=4)
    q, k, _ = heads.qkv()
    maps = []
    for epsilon in (1e-4, 0.0):
        features = [
            reference.softmax_kernel(
                x, projection_matrix=operator.feature.omega, is_query=is_query, eps=epsilon
            )
            for x, is_query in ((q, True), (k, False))
        ]
        weights = features[0] @ features[1].transpose(2, 3)
        maps.append(weights / weights.sum(-1, keepdim=True))
    theirs, exact = maps
    assert (operator.matrix(heads) - exact).norm() < 0.5 * (theirs - exact).norm()
