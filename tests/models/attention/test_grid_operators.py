"""Windows, HiLo, hybrid attention and Monarch: operators of the grid against dense masks and their equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graftvit.models.attention import tiles as tile_groups
from graftvit.models.attention import window as whole_windows
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, LayerShape, Sparse
from graftvit.models.attention.hilo import HiLoAttention
from graftvit.models.attention.hybrid import HybridAttention
from graftvit.models.attention.monarch import MonarchAttention
from graftvit.models.attention.softmax import SoftmaxAttention, softmax_rows
from graftvit.models.attention.stripes import StripeAttention
from graftvit.models.attention.tiles import blocks
from graftvit.models.attention.window import NeighborhoodAttention, WindowAttention
from graftvit.models.errors import ConfigError
from support.models.operator_cases import (
    Case,
    check_against_map,
    dense_hilo,
    dense_local,
    draw,
    is_near,
    same_window,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RAGGED = Geometry(2, (7, 9))
OPTIONS = [(7, 1), (4, 1), (3, 2), (2, 3), (5, 2), (1, 1), (2, 8)]


@pytest.mark.parametrize(("window", "dilation"), OPTIONS)
@pytest.mark.parametrize(("kind", "sees"), [(WindowAttention, same_window), (NeighborhoodAttention, is_near)])
def test_the_map_is_that_of_the_dense_mask(kind: Any, sees: Any, window: int, dilation: int) -> None:
    heads = draw(RAGGED)
    out = kind(LayerShape(2, 8, RAGGED), window, dilation)(heads)
    torch.testing.assert_close(
        out, dense_local(None, heads, window, dilation, sees=sees), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("kind", [WindowAttention, NeighborhoodAttention])
def test_a_window_as_large_as_the_grid_is_softmax_attention(kind: Any) -> None:
    heads, shape = draw(RAGGED), LayerShape(2, 8, RAGGED)
    wanted = SoftmaxAttention(shape)(heads)
    for window in (9, 100):
        torch.testing.assert_close(kind(shape, window)(heads), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(kind(shape, 8)(heads), wanted)


def test_dropout_is_on_the_map_of_a_layer_in_training() -> None:
    heads = draw(RAGGED)
    operator = WindowAttention(LayerShape(2, 8, RAGGED), 4)
    plain = operator(heads)
    heads.dropout = 0.5
    assert not torch.allclose(operator(heads), plain)
    mean = torch.stack([operator(heads) for _ in range(2000)]).mean(0)
    assert float((mean - plain).norm() / plain.norm()) < 0.1


def test_cost_is_that_of_the_equation() -> None:
    geometry = Geometry(1, (14, 14))
    prefix = 2 * geometry.num_tokens * 64 * 3
    for dilation in (1, 2):
        operator = WindowAttention(LayerShape(3, 64, geometry), 7, dilation)
        assert operator.macs(geometry) == prefix + 2 * 196 * (49 + 1) * 64 * 3
    near = NeighborhoodAttention(LayerShape(3, 64, geometry), 7)
    assert 2 < near.macs(geometry) / operator.macs(geometry) < 3


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            self.largest = max(self.largest, part.numel() if isinstance(part, Tensor) else 0)
        return out


@pytest.mark.parametrize("kind", [WindowAttention, NeighborhoodAttention])
def test_no_tensor_has_as_many_elements_as_the_map(kind: Any) -> None:
    geometry = Geometry(1, (32, 32))
    operator: AttentionOperator = kind(LayerShape(1, 8, geometry))
    heads = draw(geometry, torch.float32, batch=1, heads=1)
    heads = heads.with_qkv(*(x.requires_grad_() for x in heads.qkv()))
    with Largest() as seen:
        operator(heads).sum().backward()
        operator.terms(heads)
    assert 0 < seen.largest < geometry.num_patches**2 / 2


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 3, "dilation": 2}], ids=str)
@pytest.mark.parametrize("elements", [1, 40_000], ids=["a tile", "several images"])
def test_groups_of_tiles(options: dict[str, int], elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_groups, "CACHED", elements)
    monkeypatch.setattr(tile_groups, "MANY", 0)
    geometry = Geometry(2, (5, 8))
    operator: Any = Case("neighbourhood", options).build(geometry)
    heads = draw(geometry, batch=3)
    assert tile_groups.by_groups(heads.values(), heads.values(), operator.tables.keys)
    check_against_map(operator, heads)


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (2, 2), (2, 3), (3, 2), (1, 9)])
@pytest.mark.parametrize("grid", [(6, 6), (7, 8)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("elements", [1, 700, 2**18], ids=["a row of windows", "two images", "everything"])
def test_pieces_of_equal_windows(
    window: int,
    dilation: int,
    grid: tuple[int, int],
    prefix: int,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_windows, "CACHED", elements)
    geometry = Geometry(prefix, grid)
    heads = draw(geometry, batch=3)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads.qkv())  # as in a layer
    check_against_map(WindowAttention(LayerShape(2, 8, geometry), window, dilation), heads.with_qkv(q, k, v))
    assert whole_windows.can_take_windows(q, k, v, window, prefix)


@pytest.mark.parametrize(("window", "dilation"), [*OPTIONS, (3, 4)])
@pytest.mark.parametrize("length", [1, 5, 8, 12])
def test_spans_are_the_windows_of_the_tables(window: int, dilation: int, length: int) -> None:
    found = [
        tuple(span.start + residue + (each * span.size + i) * span.step for i in range(span.size))
        for span in whole_windows.spans(length, window, dilation)
        for residue in range(span.classes)
        for each in range(span.windows)
    ]
    assert sorted(found) == sorted(tuple(cut[0]) for cut in blocks(length, window, dilation))


# HiLo is its dense definition, with any part of low heads and windows that do not divide the grid.


HEADS = 4


def build(geometry: Geometry, **options: float) -> HiLoAttention:
    return HiLoAttention(LayerShape(HEADS, 8, geometry), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(4, 4), (6, 9), (5, 7), (1, 3), (2, 2)])
@pytest.mark.parametrize(("prefix", "alpha"), [(0, 0.0), (1, 0.25), (0, 0.5), (1, 0.9), (0, 1.0)])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_hilo_is_its_definition(grid: tuple[int, int], prefix: int, alpha: float, window: int) -> None:
    geometry = Geometry(prefix, grid)
    heads = draw(geometry, heads=HEADS)
    out = build(geometry, alpha=alpha, window=window)(heads)
    torch.testing.assert_close(out, dense_hilo(None, heads, alpha, window), rtol=1e-10, atol=1e-12)


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


# Hybrid attention against its two equations, written with dense masks.


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
    assert sum(isinstance(term, Sparse) for term in operator.terms(heads)) == 2
    *windows, kernel = operator._gates(heads)
    for gate in windows:
        torch.testing.assert_close(gate / kernel, torch.full_like(gate, 9.0), rtol=1e-3, atol=0)
    joint = HybridAttention(SHAPE, combine="joint")
    torch.testing.assert_close(joint.inside.sigmoid(), torch.full((2, 1, 1), 0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("combine", ["gate", "joint"])
def test_gradients_are_those_of_finite_differences(combine: str) -> None:
    geometry = Geometry(1, (3, 4))
    operator: Any = Case("hybrid", {"combine": combine, "window": 2}).build(geometry, heads=1, width=2)
    heads = draw(geometry, batch=1, heads=1, width=2)
    inputs = tuple(x.requires_grad_() for x in heads.qkv())
    assert torch.autograd.gradcheck(lambda *qkv: operator(heads.with_qkv(*qkv)), inputs)


def test_cost_is_the_sum_of_its_branches() -> None:
    geometry = Geometry(1, (14, 14))
    shape = LayerShape(3, 64, geometry)
    kernel = 197 * (2 * 64 * 64 + 64) * 3
    local = 2 * (197 + 2 * 196 * 50) * 64 * 3
    assert HybridAttention(shape).macs(geometry) == local + kernel + 196 * 64 * 3 * 3
    joint = HybridAttention(shape, combine="joint").macs(geometry)
    assert joint == local + kernel + 2 * 196 * 50 * 64 * 3


# MonarchAttention: exact at its limits, a maximizer of its objective, and near softmax without training.


GRID = Geometry(1, (6, 8))


def monarch_build(geometry: Geometry, **options: int) -> MonarchAttention:
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
        matrix = monarch_build(GRID, block=block, steps=steps).matrix(heads)
        torch.testing.assert_close(matrix, exact, rtol=1e-9, atol=1e-12)


def test_prefix_rows_are_exact_and_prefix_keys_are_weighed_exactly() -> None:
    geometry = Geometry(3, (4, 5))
    heads = draw(geometry, size=2)
    matrix, exact = monarch_build(geometry).matrix(heads), softmax_rows(heads, slice(None))
    torch.testing.assert_close(matrix[:, :, :3], exact[:, :, :3])
    among = matrix[:, :, 3:, :3] / matrix[:, :, 3:, :1]
    torch.testing.assert_close(among, exact[:, :, 3:, :3] / exact[:, :, 3:, :1])


def test_every_step_brings_it_nearer() -> None:
    heads = image_like(GRID)
    errors = [divergence(monarch_build(GRID, steps=steps), heads) for steps in (1, 2, 3, 6)]
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0


def test_the_factors_are_a_maximum() -> None:
    """After many steps no change of R alone makes the objective better."""
    heads = image_like(GRID)
    operator = monarch_build(GRID, steps=60)
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
    errors = [(monarch_build(geometry, steps=steps)(heads) - exact).norm() / uniform for steps in (1, 2, 3)]
    assert max(errors[1:]) < bound
    assert errors[1] < errors[0]


def test_a_block_that_does_not_divide_the_grid_sees_no_padding() -> None:
    heads = draw(GRID)
    matrix = monarch_build(GRID, block=5).matrix(heads)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 49).double())
    assert (matrix > 0).all()


def test_the_cost_grows_with_the_square_root_of_n_a_token() -> None:
    costs = [monarch_build(g).macs(g) / g.num_tokens for g in (Geometry(0, (16, 16)), Geometry(0, (64, 64)))]
    assert costs[1] == 4 * costs[0]


# Stripes: what is added to them, and their cost. Their map is that of `dense_stripes`.


@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_a_stripe_is_convolved_by_itself(num_heads: int) -> None:
    geometry = Geometry(1, (5, 6))
    operator = Case("stripes", {"width": 2}).build(geometry, heads=num_heads)
    heads, found = draw(geometry, heads=num_heads), torch.zeros(2, num_heads, 31, 8, dtype=torch.float64)
    image = heads.values()[:, :, 1:].transpose(2, 3).reshape(2, num_heads * 8, 5, 6)
    columns, rows = [range(0, 2), range(2, 4), range(4, 6)], [range(0, 2), range(2, 4), range(4, 5)]
    first = -(-num_heads // 2) * 8
    out = torch.zeros_like(image)
    for conv, part, axis, spans in zip(  # type: ignore[call-overload]
        operator.lepe, (image[:, :first], image[:, first:]), (3, 2), (columns, rows), strict=False
    ):
        done = [
            F.conv2d(
                part.index_select(axis, torch.tensor(span)),
                conv.weight,
                conv.bias,
                padding=1,
                groups=len(conv.bias),
            )
            for span in spans
        ]
        out[:, :first] = torch.cat(done, axis) if axis == 3 else out[:, :first]
        out[:, first:] = torch.cat(done, axis) if axis == 2 else out[:, first:]
    found[:, :, 1:] = out.reshape(2, num_heads, 8, 30).transpose(2, 3)
    torch.testing.assert_close(operator.local(heads), found)


def test_cost_of_stripes_is_that_of_the_equation() -> None:
    operator = StripeAttention(LayerShape(4, 8, Geometry(0, (14, 14))))
    assert operator.macs(Geometry(0, (14, 14))) == 2 * 196 * (14 * 7) * 32 + 9 * 196 * 32


@pytest.mark.parametrize("options", [{"width": 0}, {"width": True}, {"local_size": 2}])
def test_options_of_stripes_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        StripeAttention(LayerShape(2, 8, Geometry(0, (4, 4))), **options)
