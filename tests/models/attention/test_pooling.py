"""Cells of the grid: each token in one, as equal as can be, none with padding in its mean."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention.base import Geometry
from graftvit.models.attention.pooling import Pooling, cells_of, mean_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.operator_cases import draw

SIDES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=300)
@given(count=st.integers(1, 400), grid=SIDES)
def test_cells_are_as_many_as_asked_for_and_no_more(count: int, grid: tuple[int, int]) -> None:
    rows, columns = cells_of(count, Geometry(1, grid))
    assert 1 <= rows <= grid[0]
    assert 1 <= columns <= grid[1]
    assert rows * columns <= max(count, 1)
    assert 2 * rows * columns >= min(count, grid[0] * grid[1])
    if count >= grid[0] * grid[1]:
        assert (rows, columns) == grid


@pytest.mark.parametrize(
    ("count", "grid", "cells"),
    [(49, (14, 14), (7, 7)), (24, (16, 24), (4, 6)), (16, (1, 64), (1, 16)), (40, (64, 2), (40, 1))],
)
def test_cells_have_the_aspect_of_the_grid(count: int, grid: tuple[int, int], cells: tuple[int, int]) -> None:
    assert cells_of(count, Geometry(0, grid)) == cells


@settings(max_examples=50)
@given(count=st.integers(1, 60), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_means_are_those_of_the_cells_token_by_token(count: int, grid: tuple[int, int]) -> None:
    geometry = Geometry(2, grid)
    heads = draw(geometry)
    _, k, _ = heads.qkv()
    rows, columns = cells_of(count, geometry)
    members: dict[int, list[int]] = {}
    for y in range(grid[0]):
        for x in range(grid[1]):
            cell = y * rows // grid[0] * columns + x * columns // grid[1]
            members.setdefault(cell, []).append(2 + y * grid[1] + x)
    assert sorted(members) == list(range(rows * columns))
    sizes = {len({token // grid[1] for token in (t - 2 for t in tokens)}) for tokens in members.values()}
    assert max(sizes) - min(sizes) <= 1
    means = torch.stack([k[:, :, members[cell]].mean(2) for cell in range(rows * columns)], 2)
    torch.testing.assert_close(Pooling(heads, (rows, columns), k).means(k), means)
    weights = mean_weights(geometry, (rows, columns)).double()
    torch.testing.assert_close(weights @ k[:, :, 2:], means, rtol=1e-5, atol=1e-6)
    counts = Pooling(heads, (rows, columns), k).counts.flatten().tolist()
    assert counts == [len(members[cell]) for cell in range(rows * columns)]


def test_padding_is_in_no_mean_and_an_empty_cell_counts_nothing() -> None:
    geometry = Geometry(1, (2, 4))
    heads = draw(geometry)
    _, k, _ = heads.qkv()
    heads.key_mask = torch.ones(2, 9, dtype=torch.bool)
    heads.key_mask[0, [3, 4, 7, 8]] = False  # the right half
    heads.key_mask[1, [0, 1]] = False
    pooling = Pooling(heads, (1, 2), k)
    means = pooling.means(k.masked_fill(~heads.key_mask[:, None, :, None], torch.nan))
    torch.testing.assert_close(means[0, :, 0], k[0][:, [1, 2, 5, 6]].mean(1))
    assert not means[0, :, 1].any()
    torch.testing.assert_close(means[1, :, 0], k[1][:, [2, 5, 6]].mean(1))
    expected = torch.tensor([[1.0, 4, 0], [0, 3, 4]]).log().double()
    torch.testing.assert_close(pooling.log_counts()[:, 0, 0], expected)
