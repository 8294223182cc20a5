"""MonarchAttention: exact at its limits, a maximizer of its objective, and near softmax without training."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.monarch import MonarchAttention
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.errors import ConfigError
from support.models.operator_cases import Case, draw
from torch import Tensor

GRID = Geometry(1, (6, 8))


def build(geometry: Geometry, **options: int) -> MonarchAttention:
    return MonarchAttention(LayerShape(2, 8, geometry), **options)


def image_like(geometry: Geometry, size: float = 3.0) -> Heads:
    """Queries and keys that vary smoothly over the grid, as those of an image do, with some noise."""
    height, width = geometry.grid
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    waves = torch.stack([f(a * y + b * x) for f in (torch.sin, torch.cos) for a, b in ((1, 0), (0, 1))], -1)
    heads = draw(geometry, seed=3)
    q, k, v = heads.qkv()
    smooth = torch.cat((waves, waves.flip(1)), -1).flatten(0, 1).double()
    smooth = torch.cat((torch.zeros(geometry.num_prefix, 8).double(), smooth))
    return heads.with_qkv(size * smooth + 0.5 * q, size * smooth + 0.5 * k, v)


def divergence(operator: MonarchAttention, heads: Heads) -> Tensor:
    """Σ KL(A ‖ softmax) over the rows of grid tokens: what the steps minimize."""
    exact = softmax_rows(heads, slice(None))
    found = operator.matrix(heads)
    rows = (found * (found.clamp_min(1e-300).log() - exact.log())).sum(-1)
    return rows[:, :, GRID.num_prefix :].sum()


@pytest.mark.parametrize("block", [1, GRID.num_patches, 1000])
def test_with_blocks_of_one_token_or_one_block_it_is_softmax(block: int) -> None:
    heads = draw(GRID, size=2)
    exact = softmax_rows(heads, slice(None))
    for steps in (1, 2):
        matrix = build(GRID, block=block, steps=steps).matrix(heads)
        torch.testing.assert_close(matrix, exact, rtol=1e-9, atol=1e-12)


def test_prefix_rows_are_exact_and_prefix_keys_are_weighed_exactly() -> None:
    geometry = Geometry(3, (4, 5))
    heads = draw(geometry, size=2)
    matrix, exact = build(geometry).matrix(heads), softmax_rows(heads, slice(None))
    torch.testing.assert_close(matrix[:, :, :3], exact[:, :, :3])
    among = matrix[:, :, 3:, :3] / matrix[:, :, 3:, :1]
    torch.testing.assert_close(among, exact[:, :, 3:, :3] / exact[:, :, 3:, :1])


def test_every_step_brings_it_nearer() -> None:
    heads = image_like(GRID)
    errors = [divergence(build(GRID, steps=steps), heads) for steps in (1, 2, 3, 6)]
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0


def test_the_factors_are_a_maximum() -> None:
    """After many steps no change of R alone makes the objective better."""
    heads = image_like(GRID)
    operator = build(GRID, steps=60)
    factors = operator._factors(heads)
    best = divergence(operator, heads)
    first, columns = GRID.num_prefix, GRID.grid[1]
    exact = softmax_rows(heads, slice(None))[:, :, first:]
    for seed in range(3):
        noise = torch.randn(factors.within.shape, generator=torch.Generator().manual_seed(seed))
        within = (factors.within.log() + 0.05 * noise).softmax(-1)
        place, row = torch.arange(48) % columns, torch.arange(48) // columns
        grid = torch.einsum("bhsk,bhksi->bhski", factors.blocks[:, :, place, row], within[:, :, :, place])
        found = torch.cat((factors.prefix[:, :, place, row], grid.flatten(3)), 3)
        assert (found * (found.log() - exact.log())).sum() > best


@pytest.mark.parametrize(("size", "bound"), [(0.5, 0.8), (1.5, 0.45), (3.0, 0.25), (5.0, 0.2)])
def test_without_training_it_is_nearer_to_softmax_than_uniform_attention(size: float, bound: float) -> None:
    """The sharper the maps, the more so: the largest weight of a row is 0.01 to 0.45 here, 0.005 if uniform."""
    geometry = Geometry(1, (14, 14))
    heads = image_like(geometry, size)
    _, _, v = heads.qkv()
    exact = softmax_rows(heads, slice(None)) @ v
    uniform = (v.mean(2, keepdim=True) - exact).norm()
    errors = [(build(geometry, steps=steps)(heads) - exact).norm() / uniform for steps in (1, 2, 3)]
    assert max(errors[1:]) < bound
    assert errors[1] < errors[0]


def test_a_block_that_does_not_divide_the_grid_sees_no_padding() -> None:
    heads = draw(GRID)
    matrix = build(GRID, block=5).matrix(heads)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 49).double())
    assert (matrix > 0).all()


def test_hidden_tokens_have_no_say_as_queries_either() -> None:
    operator, heads = Case("monarch", {"block": 5}).build(GRID), draw(GRID)
    q, k, v = heads.qkv()
    seen = torch.ones(2, 49, dtype=torch.bool)
    seen[:, 20:33] = False  # a whole block among them
    seen[:, 0] = False
    heads.key_mask = seen
    out = operator(heads)
    assert out.isfinite().all()
    assert not operator.matrix(heads)[..., ~seen[0]].any()
    changed = operator(heads.with_qkv(q.masked_fill(~seen[:, None, :, None], 9.0), k, v))
    torch.testing.assert_close(changed[:, :, seen[0]], out[:, :, seen[0]])


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("steps", True), ("steps", 101), ("block", -3), ("block", 2.5)]
)
def test_options_are_whole_numbers(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value}"):
        build(GRID, **{option: value})


def test_the_cost_grows_with_the_square_root_of_n_a_token() -> None:
    costs = [build(g).macs(g) / g.num_tokens for g in (Geometry(0, (16, 16)), Geometry(0, (64, 64)))]
    assert costs[1] == 4 * costs[0]
