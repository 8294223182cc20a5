"""HiLo is its dense definition, with any part of low heads and windows that do not divide the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.hilo import HiLoAttention
from graftvit.models.errors import ConfigError
from support.models.operator_cases import draw
from torch import Tensor

HEADS = 4


def build(geometry: Geometry, **options: float) -> HiLoAttention:
    return HiLoAttention(LayerShape(HEADS, 8, geometry), **options)  # type: ignore[arg-type]


def dense(heads: Heads, alpha: float, window: int) -> Tensor:
    """Return the output one query at a time, from the paper's definition."""
    q, k, v = heads.qkv()
    geometry, out = heads.tokens(), torch.zeros_like(v)
    prefix, (rows, columns) = geometry.num_prefix, geometry.grid
    high = 0 if window == 1 else HEADS - int(HEADS * alpha)
    cells = [(y // window, x // window) for y in range(rows) for x in range(columns)]
    members = {
        cell: [prefix + i for i, each in enumerate(cells) if each == cell] for cell in sorted(set(cells))
    }
    for head in range(HEADS):
        pooled_k, pooled_v = (
            torch.stack(
                [x[:, head, i] for i in range(prefix)] + [x[:, head, m].mean(1) for m in members.values()], 1
            )
            for x in (k, v)
        )
        for query in range(geometry.num_tokens):
            keys, values = k[:, head], v[:, head]
            if query >= prefix and head < high:
                near = [*range(prefix), *members[cells[query - prefix]]]
                keys, values = keys[:, near], values[:, near]
            elif query >= prefix:
                keys, values = pooled_k, pooled_v
            weights = (heads.scale * (keys @ q[:, head, query, :, None])[..., 0]).softmax(-1)
            out[:, head, query] = (weights[:, None] @ values)[:, 0]
    return out


@pytest.mark.parametrize("grid", [(4, 4), (6, 9), (5, 7), (1, 3), (2, 2)])
@pytest.mark.parametrize(("prefix", "alpha"), [(0, 0.0), (1, 0.25), (0, 0.5), (1, 0.9), (0, 1.0)])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_hilo_is_its_definition(grid: tuple[int, int], prefix: int, alpha: float, window: int) -> None:
    geometry = Geometry(prefix, grid)
    heads = draw(geometry, heads=HEADS)
    out = build(geometry, alpha=alpha, window=window)(heads)
    torch.testing.assert_close(out, dense(heads, alpha, window), rtol=1e-10, atol=1e-12)


def test_means_of_projections_are_projections_of_means() -> None:
    """The paper pools the tokens, then projects them: with a bias, too."""
    geometry = Geometry(0, (5, 6))
    operator = build(geometry, alpha=1.0, window=2)
    tokens = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    projection = torch.nn.Linear(32, 32).double()
    pooled = F.avg_pool2d(tokens, 2, ceil_mode=True, count_include_pad=False)
    wanted = projection(pooled.flatten(2).transpose(1, 2))
    projected = projection(tokens.flatten(2).transpose(1, 2)).unflatten(2, (HEADS, 8)).transpose(1, 2)
    found = operator._with_means(projected, geometry).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_the_definition() -> None:
    geometry = Geometry(1, (5, 3))
    heads = draw(geometry, heads=HEADS)
    inputs = [x.requires_grad_() for x in heads.qkv()]
    direction = torch.randn_like(inputs[0])
    outputs = (build(geometry, alpha=0.5, window=2)(heads), dense(heads, 0.5, 2))
    found, wanted = (torch.autograd.grad((out * direction).sum(), inputs) for out in outputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_high_heads_come_first_and_low_ones_are_rounded_down() -> None:
    geometry = Geometry(0, (4, 4))
    assert build(geometry, alpha=0.9, window=2).num_high == 1
    assert build(geometry, alpha=0.24, window=2).num_high == HEADS
    assert HiLoAttention(LayerShape(12, 8, geometry)).num_high == 2, "LITv2-S, stage 3"
    assert build(geometry, alpha=0.1, window=1).num_high == 0, "a window of one token pools nothing"


def test_cost() -> None:
    """6 x 6 tokens, windows of 2: 9 windows; 3 high heads see 4 keys, one low head 9."""
    geometry = Geometry(0, (6, 6))
    assert build(geometry, alpha=0.25, window=2).macs(geometry) == 2 * 8 * 36 * (3 * 4 + 9)
    ragged = Geometry(1, (3, 3))  # windows of 4, 2, 2 and 1 tokens
    counted = 2 * 8 * (HEADS * 10 + 3 * (4 * 5 + 2 * (2 * 3) + 2) + 9 * (1 + 4))
    assert build(ragged, alpha=0.25, window=2).macs(ragged) == counted
    costs = [build(g, alpha=1.0, window=w).macs(g) / g.num_tokens for g, w in
             ((Geometry(0, (8, 8)), 2), (Geometry(0, (32, 32)), 8))]  # fmt: skip
    assert costs[0] == costs[1], "linear for a fixed number of windows"


def test_another_grid_than_the_layers_own() -> None:
    heads = draw(Geometry(0, (7, 5)), heads=HEADS)
    out = build(Geometry(0, (4, 4)), alpha=0.5, window=2)(heads)
    torch.testing.assert_close(out, dense(heads, 0.5, 2), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    geometry = Geometry(1, (5, 7))  # which windows of 2 x 2 do not divide
    operator = build(geometry, alpha=0.5, window=2).eval()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.operator = operator

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.operator(Heads(q, k, v, None, 8**-0.5, geometry=geometry))
            return out

    inputs = tuple(x.float() for x in draw(geometry, heads=HEADS).qkv())
    program = torch.onnx.export(Layer(), inputs, dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    [found] = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    np.testing.assert_allclose(found, Layer()(*inputs).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "alpha=1.5; give the part of low heads, a number from 0 to 1"),
        ({"alpha": "much"}, "alpha=much; give"),
        ({"window": 0}, "window=0; give a whole number of tokens, 1 or more"),
        ({"window": 2.5}, "window=2.5; give"),
    ],
)
def test_options_are_checked(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(Geometry(0, (4, 4)), **options)
