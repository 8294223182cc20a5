"""Agent attention: its equation, where it is exact, and what its default costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.models.attention.agent import AgentAttention
from graftvit.models.attention.base import Geometry, LayerShape
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.errors import ConfigError
from support.models.operator_cases import Case, draw

GRID = Geometry(2, (5, 7))


def build(geometry: Geometry = GRID, **options: Any) -> AgentAttention:
    return AgentAttention(LayerShape(2, 8, geometry), **options).double()


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_output_is_the_equation(prefix: int) -> None:
    geometry = Geometry(prefix, (5, 7))
    heads = draw(geometry, size=2)
    out = Case("agent", {"num_agents": 6, "local_size": 0}).build(geometry)(heads)
    q, k, v = heads.qkv()
    cells = [
        [prefix + y * 7 + x for y in rows for x in columns]
        for rows in ([0, 1, 2], [3, 4])
        for columns in ([0, 1, 2], [3, 4], [5, 6])
    ]
    counts = torch.tensor([*[1] * prefix, *map(len, cells)]).double().log()
    for image in range(2):
        for head in range(2):
            q1, k1, v1 = q[image, head], k[image, head], v[image, head]
            agents = torch.stack([q1[cell].mean(0) for cell in cells])
            gathered = (heads.scale * agents @ k1.T).softmax(-1) @ v1
            keys, values = torch.cat((k1[:prefix], agents)), torch.cat((v1[:prefix], gathered))
            grid = (heads.scale * q1[prefix:] @ keys.T + counts).softmax(-1) @ values
            exact = (heads.scale * q1[:prefix] @ k1.T).softmax(-1) @ v1
            torch.testing.assert_close(out[image, head], torch.cat((exact, grid)))


def test_the_local_term_is_a_convolution_of_each_channel_on_the_grid() -> None:
    operator, heads = build(num_agents=6), draw(GRID)
    assert operator.conv is not None
    start = operator(heads)
    torch.testing.assert_close(start, build(num_agents=6, local_size=0)(heads))
    with torch.no_grad():
        operator.conv.weight[:, 0, 0, 1] = torch.arange(16.0)  # what is one row above, times the channel
    _, _, v = heads.qkv()
    added = (operator(heads) - start)[:, :, 2:].unflatten(2, (5, 7))
    times = torch.arange(16.0).double().reshape(1, 2, 1, 1, 8)
    torch.testing.assert_close(added[:, :, 1:], times * v[:, :, 2:].unflatten(2, (5, 7))[:, :, :-1])
    assert not added[:, :, 0].any()
    torch.testing.assert_close(operator(heads)[:, :, :2], start[:, :, :2])


def test_it_is_softmax_where_queries_are_equal() -> None:
    geometry = Geometry(0, (6, 8))
    heads = draw(geometry, size=3)
    q, k, v = heads.qkv()
    same = heads.with_qkv(q[:, :, :1].expand_as(q), k, v)
    exact = softmax_rows(same, slice(None))
    torch.testing.assert_close(build(geometry, num_agents=4).matrix(same), exact)


def test_prefix_rows_are_exact_and_prefix_keys_have_weights_of_their_own() -> None:
    heads = draw(GRID, size=2)
    q, k, v = heads.qkv()
    operator = build(num_agents=6)
    torch.testing.assert_close(operator.matrix(heads)[:, :, :2], softmax_rows(heads, slice(2)))
    looked_at = heads.with_qkv(q, torch.cat((k[:, :, :1], 40 * q[:, :, 9:10], k[:, :, 2:]), 2), v)
    assert (operator.matrix(looked_at)[:, :, 9, 1] > 0.99).all()


def test_hidden_tokens_have_no_say_as_queries_either() -> None:
    operator, heads = Case("agent", {"num_agents": 6}).build(GRID), draw(GRID)
    heads.key_mask = torch.ones(2, 37, dtype=torch.bool)
    heads.key_mask[:, [0, 4, 11, 30]] = False
    heads.key_mask[:, [2 + y * 7 + x for y in (3, 4) for x in (0, 1, 2)]] = False  # a whole cell
    hidden, seen = ~heads.key_mask[:, None, :, None], heads.key_mask[0]
    out = operator(heads)
    changed = operator(heads.with_qkv(*(x.masked_fill(hidden, 9.0) for x in heads.qkv())))
    assert out.isfinite().all()
    torch.testing.assert_close(changed[:, :, seen], out[:, :, seen], rtol=1e-10, atol=1e-12)
    matrix = operator.matrix(heads)
    assert not matrix[..., ~seen].any()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 37).double())


def test_any_grid_has_as_many_agents() -> None:
    operator = build(num_agents=12)
    for grid, cells in (((8, 11), (3, 4)), ((3, 2), (3, 2)), ((40, 1), (12, 1))):
        assert operator.cells(Geometry(2, grid)) == cells
        assert operator(draw(Geometry(2, grid))).isfinite().all()
    assert operator.traits.resolution == "free"


@pytest.mark.parametrize("value", [0, 36, True, 2.0])
def test_the_number_of_agents_is_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"plan: num_agents={value}; give a whole number from 1 to 35"):
        build(num_agents=value)


@pytest.mark.parametrize(("grid", "agents", "ratio"), [
    ((14, 14), 49, 0.50), ((32, 32), 49, 0.10), ((14, 14), None, 0.50), ((64, 64), None, 0.04),
])  # fmt: skip
def test_the_cost_against_softmax(grid: tuple[int, int], agents: int | None, ratio: float) -> None:
    geometry = Geometry(1, grid)
    operator = AgentAttention(LayerShape(1, 64, geometry), agents, local_size=0)
    softmax = 2 * geometry.num_tokens**2 * 64
    assert operator.macs(geometry) / softmax == pytest.approx(ratio, abs=0.035)
