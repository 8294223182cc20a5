"""Resampled positions against the formulas: cubic convolution by hand, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graftvit.checkpoints.fit import Method, find_grid, resample_position
from torch import Tensor


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """Rows of weights, half-pixel centers. Antialiased: a = -0.5 and the kernel stretched where the grid shrinks,
    cut at the border and normalized. Plain: a = -0.75, and the border repeats."""
    scale = old / new
    weights = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * scale - 0.5
        if antialias:
            support = max(scale, 1.0)
            values = cubic((np.arange(old) - center) / support, -0.5)
            weights[row] = values / values.sum()
        else:
            first = int(np.floor(center)) - 1
            for index in range(first, first + 4):
                weights[row, min(max(index, 0), old - 1)] += cubic(np.array(index - center), -0.75)
    return weights


def reference(
    position: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, method: Method
) -> np.ndarray:
    values = position.double().numpy()[0]
    grid = values[prefix:].reshape(*old, -1)
    antialias = method == "timm"
    rows, columns = matrix(old[0], new[0], antialias), matrix(old[1], new[1], antialias)
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, grid)
    return np.concatenate([values[:prefix], resized.reshape(new[0] * new[1], -1)])[None]


@pytest.mark.parametrize("method", ["timm", "mae"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((4, 6), (6, 4)), ((3, 5), (8, 2)), ((1, 4), (3, 3))],
)
def test_both_ways_follow_their_formula(
    method: Method, prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> None:
    position = torch.randn(1, prefix + old[0] * old[1], 3)
    resized = resample_position(position, old, new, prefix, method)
    np.testing.assert_allclose(resized.numpy(), reference(position, old, new, prefix, method), atol=2e-5)


def test_the_two_ways_differ_where_the_grid_shrinks() -> None:
    position = torch.randn(1, 197, 4)
    timm_way, mae_way = (resample_position(position, (14, 14), (7, 7), 1, way) for way in ("timm", "mae"))
    assert (timm_way - mae_way).abs().max() > 0.1


@pytest.mark.parametrize("method", ["timm", "mae"])
def test_the_same_grid_is_left_alone_and_the_dtype_stays(method: Method) -> None:
    position = torch.randn(1, 13, 4, dtype=torch.bfloat16)
    assert resample_position(position, (3, 4), (3, 4), 1, method) is position
    assert resample_position(position, (3, 4), (4, 3), 1, method).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("patches", "declared", "grid"),
    [
        (196, None, (14, 14)), (24, (4, 6), (4, 6)), (36, (4, 9), (4, 9)), (36, (5, 9), (6, 6)),
        (24, None, None), (24, (5, 5), None), (0, None, None), (-1, None, None), (1, None, (1, 1)),
    ],
)  # fmt: skip
def test_a_grid_is_the_declared_one_or_a_square(
    patches: int, declared: tuple[int, int] | None, grid: tuple[int, int] | None
) -> None:
    assert find_grid(patches, declared) == grid
