"""Numbers about maps against loops over their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from graftvit.models.attention.base import Geometry
from graftvit.transfer.analysis.layer_maps import patch_distances
from graftvit.transfer.analysis.visualize.map_figures import entropy, linear_cka, mean_distance, roll, shares
from torch import Tensor

LAYERS, HEADS = 3, 2
GEOMETRY = Geometry(2, (2, 3))


def maps(signed: bool = False) -> Tensor:
    torch.manual_seed(0)
    drawn = torch.randn(LAYERS, HEADS, GEOMETRY.num_tokens, GEOMETRY.num_tokens, dtype=torch.float64)
    return drawn if signed else (2 * drawn).softmax(-1)


def dense_shares(row: list[float]) -> list[float]:
    total = sum(abs(weight) for weight in row)
    return [abs(weight) / total for weight in row]


@pytest.mark.parametrize("signed", [False, True])
def test_shares(signed: bool) -> None:
    drawn = maps(signed)
    expected = [[[dense_shares(row) for row in head] for head in layer] for layer in drawn.tolist()]
    torch.testing.assert_close(shares(drawn), torch.tensor(expected, dtype=torch.float64))
    if not signed:
        torch.testing.assert_close(shares(drawn), drawn)


def test_shares_of_an_empty_row_are_even() -> None:
    torch.testing.assert_close(shares(torch.zeros(1, 4)), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("signed", [False, True])
def test_rollout(signed: bool) -> None:
    drawn = maps(signed)
    tokens = GEOMETRY.num_tokens
    so_far = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
    rolled = [torch.eye(tokens, dtype=torch.float64)]
    for layer in drawn:
        rolled.append(roll(rolled[-1], shares(layer).mean(0)))
    for number in range(LAYERS):
        heads = [[dense_shares(row) for row in head] for head in drawn[number].tolist()]
        mixed = [
            [0.5 * sum(head[i][j] for head in heads) / HEADS + 0.5 * (i == j) for j in range(tokens)]
            for i in range(tokens)
        ]
        so_far = [
            [sum(mixed[i][k] * so_far[k][j] for k in range(tokens)) for j in range(tokens)]
            for i in range(tokens)
        ]
        torch.testing.assert_close(rolled[number + 1], torch.tensor(so_far, dtype=torch.float64))
    torch.testing.assert_close(rolled[-1].sum(-1), torch.ones(tokens, dtype=torch.float64))


def test_entropy() -> None:
    drawn = maps()
    for layer in range(LAYERS):
        for head in range(HEADS):
            rows = drawn[layer, head].tolist()
            expected = sum(-sum(p * math.log(p) for p in row) for row in rows) / len(rows)
            assert entropy(drawn)[layer, head].item() == pytest.approx(expected, abs=1e-12)
    assert entropy(torch.ones(8, 8, dtype=torch.float64)).item() == pytest.approx(math.log(8))
    assert entropy(torch.eye(8)).item() == 0


def test_mean_distance() -> None:
    drawn = maps(signed=True)
    height, width = GEOMETRY.grid
    places = [(row, column) for row in range(height) for column in range(width)]
    for layer in range(LAYERS):
        for head in range(HEADS):
            far = 0.0
            for i, here in enumerate(places):
                row = dense_shares(drawn[layer, head, 2 + i, 2:].tolist())
                far += sum(share * math.dist(here, there) for share, there in zip(row, places, strict=True))
            found = mean_distance(drawn[..., 2:, 2:], patch_distances(GEOMETRY))[layer, head].item()
            assert found == pytest.approx(far / len(places), abs=1e-12)
    assert mean_distance(torch.eye(GEOMETRY.num_patches), patch_distances(GEOMETRY)).item() == 0


def test_cka_is_its_debiased_definition_on_gram_matrices() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        k, other = (each @ each.T for each in (a, b))
        k, other = (each - each.diag().diag() for each in (k, other))
        return (k * other).sum() + k.sum() * other.sum() / (8 * 7) - 2 / 7 * (k @ other).sum()

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert linear_cka(x, y) == pytest.approx(expected.item(), abs=1e-9)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, torch.ones(9, 2)) == 0
    assert linear_cka(x[:3], y[:3]) is None
