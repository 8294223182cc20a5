"""Attention to means of tokens: cells of the grid, agents, landmarks and learned pooling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import graftvit.checkpoints.pretrained as loading
import pytest
import timm
import torch
from graftvit.models.attention import pooling as small_maps
from graftvit.models.attention.agent import AgentAttention
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.linformer import LinformerAttention, interpolated
from graftvit.models.attention.nystrom import NystromAttention, pseudo_inverse
from graftvit.models.attention.pooling import (
    Pooling,
    cells_of,
    mean_weights,
    pooling_macs,
    small_map_attention,
)
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.conversion import convert, converted_layers, new_parameters, plan_of, resize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from support.models import dense
from support.models.operator_cases import Case, coarse, draw
from support.models.tiny_students import save_folder
from torch import Tensor, nn

GRID = Geometry(2, (6, 8))
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


# Attention that forms its maps, in pieces, against the whole map.


WIDTHS = pytest.mark.parametrize("width", [5, 1], ids=["maps are kept", "maps are computed again"])


@WIDTHS
@pytest.mark.parametrize(("queries", "keys"), [(17, 4), (4, 17)], ids=["few keys", "few queries"])
@pytest.mark.parametrize("weights", [1, 2 * 4 * 7, 2 * 4 * 17], ids=["a query", "seven queries", "two heads"])
def test_pieces_give_the_gradients_of_the_map(
    width: int, queries: int, keys: int, weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_maps, "CACHED", weights)
    q, k, v, bias = inputs = [
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((3, 2, queries, width), (3, 2, keys, width), (3, 2, keys, width), (1, 1, 1, keys))
    ]
    out = small_map_attention(q, k, v, bias, 0.3)
    wanted = (0.3 * q @ k.transpose(2, 3) + bias).softmax(-1) @ v
    upstream = torch.randn_like(out)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    assert type(out.grad_fn).__name__ == "_SmallMapsBackward"
    first, found = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    for gradient, whole in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, whole, rtol=1e-8, atol=1e-10)
    assert all(map(torch.equal, first, found)), "the backward pass changed what it read"


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_has_its_tokens_before_its_heads(biased: bool) -> None:
    """Views of a layer's projections, of which only some need a gradient, and a constant bias."""
    q, k, v = torch.randn(3, 2, 9, 2, 8, dtype=torch.float64).transpose(2, 3).unbind(0)
    q, bias = q.requires_grad_(), torch.randn(1, 1, 1, 9, dtype=torch.float64) if biased else None
    out = small_map_attention(q, k, v, bias, 0.3)
    wanted = (0.3 * q @ k.transpose(2, 3) + (0 if bias is None else bias)).softmax(-1) @ v
    torch.testing.assert_close(out, wanted)
    assert out.stride() == q.stride()
    (found,), (whole,) = (torch.autograd.grad(x.sum(1).mean(), [q]) for x in (out, wanted))
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("kind", ["map of many", "mask", "bias by image", "half precision", "no gradient"])
def test_other_inputs_take_the_fused_kernels(kind: str) -> None:
    tokens = 512 if kind == "map of many" else 9
    dtype = torch.bfloat16 if kind == "half precision" else torch.float32
    q, k, v = torch.randn(3, 2, 2, tokens, 8, dtype=dtype).requires_grad_(kind != "no gradient").unbind(0)
    bias = {
        "mask": torch.arange(2 * tokens).view(2, 1, 1, tokens) % 3 > 0,
        "bias by image": torch.randn(2, 1, 1, tokens),
    }.get(kind)
    out = small_map_attention(q, k, v, bias, 0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    assert torch.equal(out, wanted)
    assert type(out.grad_fn).__name__ != "_SmallMapsBackward"


# Agent attention: its equation, where it is exact, and what its default costs.


AGENT_GRID = Geometry(2, (5, 7))


def build_agent(geometry: Geometry = AGENT_GRID, **options: Any) -> AgentAttention:
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
    operator, heads = build_agent(num_agents=6), draw(AGENT_GRID)
    assert operator.conv is not None
    start = operator(heads)
    torch.testing.assert_close(start, build_agent(num_agents=6, local_size=0)(heads))
    with torch.no_grad():
        operator.conv.weight[:, 0, 0, 1] = torch.arange(16.0)  # what is one row above, times the channel
    _, _, v = heads.qkv()
    added = (operator(heads) - start)[:, :, 2:].unflatten(2, (5, 7))
    times = torch.arange(16.0).double().reshape(1, 2, 1, 1, 8)
    torch.testing.assert_close(added[:, :, 1:], times * v[:, :, 2:].unflatten(2, (5, 7))[:, :, :-1])
    assert not added[:, :, 0].any()
    torch.testing.assert_close(operator(heads)[:, :, :2], start[:, :, :2])


# Nyströmformer: its equation, its limits, its pseudo-inverse, and parity with a public version.


def build_nystrom(geometry: Geometry = GRID, heads: int = 2, **options: Any) -> NystromAttention:
    return NystromAttention(LayerShape(heads, 8, geometry), **options).double()


def spiky(geometry: Geometry) -> Heads:
    """Every token looks at itself most of all, so that the small map is far from singular."""
    heads = draw(geometry)
    q, _, v = heads.qkv()
    unit = q / q.norm(dim=-1, keepdim=True)
    return heads.with_qkv(4 * unit, 4 * unit, v)


@pytest.mark.parametrize("iterations", [1, 6])
def test_the_output_is_the_equation_of_nystrom(iterations: int) -> None:
    """Image by image and head by head, with the mean of each cell's tokens written out."""
    operator, heads = (
        Case("nystrom", {"num_landmarks": 6, "iterations": iterations, "local_size": 0}),
        draw(GRID),
    )
    out = operator.build(GRID)(heads)
    q, k, v = heads.qkv()
    cells = [
        [2 + y * 8 + x for y in rows for x in columns]
        for rows in ([0, 1, 2], [3, 4, 5])
        for columns in ([0, 1, 2], [3, 4, 5], [6, 7])
    ]
    counts = torch.tensor([1, 1, *map(len, cells)]).double().log()
    for image in range(2):
        for head in range(2):
            q1, k1, v1 = q[image, head], k[image, head], v[image, head]
            q2, k2 = (torch.cat((x[:2], torch.stack([x[cell].mean(0) for cell in cells]))) for x in (q1, k1))
            first = (heads.scale * q1[2:] @ k2.T + counts).softmax(-1)
            middle = (heads.scale * q2 @ k2.T + counts).softmax(-1)
            last = (heads.scale * q2 @ k1.T).softmax(-1)
            inverse = middle.T / (middle.abs().sum(0).max() * middle.abs().sum(1).max())
            for _ in range(iterations):
                p = middle @ inverse
                inverse = inverse @ (13 * torch.eye(8) - 15 * p + 7 * p @ p - p @ p @ p) / 4
            exact = (heads.scale * q1[:2] @ k1.T).softmax(-1) @ v1
            expected = torch.cat((exact, first @ inverse @ last @ v1))
            torch.testing.assert_close(out[image, head], expected, rtol=1e-8, atol=1e-10)


def test_with_a_landmark_for_each_patch_and_many_iterations_it_is_softmax() -> None:
    heads = spiky(GRID)
    exact = softmax_rows(heads, slice(None))
    errors = []
    for iterations in (3, 6, 12):
        matrix = build_nystrom(num_landmarks=48, iterations=iterations).matrix(heads)
        errors.append(float((matrix - exact).norm() / exact.norm()))
    assert errors[0] > 1e-2 > errors[1] > 1e-5
    assert errors[2] < 1e-12


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_it_is_softmax_where_keys_are_equal_in_each_cell(prefix: int) -> None:
    """Only with the log of the counts, as cells have 4 and 2 tokens and prefix tokens are one."""
    geometry = Geometry(prefix, (5, 4))
    q, k, v = coarse(geometry, (3, 2)).qkv()
    heads = coarse(geometry, (3, 2)).with_qkv(12 * k + q, k, v)
    exact = softmax_rows(heads, slice(None))
    matrix = build_nystrom(geometry, num_landmarks=6, iterations=60).matrix(heads)
    torch.testing.assert_close(matrix, exact, rtol=1e-6, atol=1e-8)


def test_the_pseudo_inverse_is_that_of_linear_algebra() -> None:
    x = (3 * torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(x, 40), torch.linalg.pinv(x), rtol=1e-6, atol=1e-6)
    x[1, 2, 5] = x[1, 2, 4]
    singular = pseudo_inverse(
        x, 20
    )  # after many more the rounding would show, 13/4 times as large after each
    torch.testing.assert_close(x @ singular @ x, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 6, 12])
def test_landmarks_that_are_all_alike_give_the_mean(iterations: int) -> None:
    """A blank image: the small map has rank one, in float32."""
    heads = draw(GRID, torch.float32)
    q, k, v = heads.qkv()
    blank = heads.with_qkv(q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v)
    out = build_nystrom(num_landmarks=12, iterations=iterations).float()(blank)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), rtol=1e-4, atol=1e-5)


def test_other_matrices_of_the_batch_do_not_change_an_inverse() -> None:
    """Public versions scale all of a batch by its largest norm; here each matrix has its own."""
    x = (torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()).softmax(-1)
    x[1] = torch.eye(9) * 0.2 + 0.8 * torch.eye(9)[:1]
    assert torch.equal(pseudo_inverse(x, 6)[:1], pseudo_inverse(x[:1], 6))


@pytest.mark.parametrize("num_landmarks", [3, 4, 12])
@pytest.mark.parametrize("iterations", [2, 6])
def test_parity_with_nystrom_attention(num_landmarks: int, iterations: int) -> None:
    """Where that package is right: one image and one head, as it scales the inverse by the largest norms of the
    batch and of all heads; landmarks that divide the tokens, as it pads with zeros in front and attends to them;
    and a sequence for a grid, as its landmarks are segments. Its convolution is along the sequence."""
    public = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    module = public.NystromAttention(
        dim=8, dim_head=8, heads=1, num_landmarks=num_landmarks, pinv_iterations=iterations, residual=False
    ).double()
    module.to_out = torch.nn.Identity()
    x = 3 * torch.randn(1, 12, 8).double()
    q, k, v = module.to_qkv(x)[:, None].chunk(3, dim=-1)
    geometry = Geometry(0, (12, 1))
    operator = build_nystrom(geometry, 1, num_landmarks=num_landmarks, iterations=iterations, local_size=0)
    found = operator(Heads(q, k, v, None, 8**-0.5, geometry=geometry))
    torch.testing.assert_close(found[:, 0], module(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("operator", [build_agent(num_agents=12), build_nystrom(num_landmarks=12)])
def test_any_grid_has_as_many_cells(operator: Any) -> None:
    """Nothing is tied to the grid: 12 cells at most, and all tokens of a small grid."""
    for grid, cells in (((8, 11), (3, 4)), ((12, 9), (4, 3)), ((2, 3), (2, 3)), ((40, 1), (12, 1))):
        assert operator.cells(Geometry(2, grid)) == cells
        assert operator(draw(Geometry(2, grid))).isfinite().all()
    assert operator.traits.resolution == "free"


def test_it_starts_without_its_convolution() -> None:
    heads = draw(GRID)
    local: Tensor | None = build_nystrom().local(heads)
    assert local is not None
    assert not local.any()
    assert build_nystrom(local_size=0).local(heads) is None
    assert not list(build_nystrom(local_size=0).parameters())


@pytest.mark.parametrize(("grid", "landmarks", "ratio"), [
    ((14, 14), 16, 0.19), ((14, 14), 49, 1.10), ((14, 14), 64, 1.97), ((32, 32), 64, 0.17), ((32, 32), 49, 0.12),
])  # fmt: skip
def test_the_cost_against_softmax_of_nystrom(grid: tuple[int, int], landmarks: int, ratio: float) -> None:
    """The published counts have no means in them, and no prefix."""
    geometry = Geometry(0, grid)
    operator = NystromAttention(LayerShape(1, 64, geometry), landmarks, local_size=0)
    macs = operator.macs(geometry) - 2 * 64 * pooling_macs(geometry, operator.cells(geometry))
    assert macs / (2 * geometry.num_tokens**2 * 64) == pytest.approx(ratio, rel=0.05)
    assert macs < operator.macs(geometry) < 1.3 * macs


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (24, 24), (64, 64)])
def test_the_default_costs_less_than_softmax(grid: tuple[int, int]) -> None:
    geometry = Geometry(1, grid)
    assert (
        NystromAttention(LayerShape(1, 64, geometry)).macs(geometry) < 0.8 * 2 * geometry.num_tokens**2 * 64
    )


# Linformer: its equation, its limit, and pooling that is shared, interpolated and saved.


PLAN = "*: linformer(num_keys=6, sharing=layerwise); 3: linformer(num_keys=4, sharing=layerwise)"


def build_linformer(geometry: Geometry = GRID, **options: Any) -> LinformerAttention:
    return LinformerAttention(LayerShape(2, 8, geometry), **options)


def student(plan: str = PLAN) -> nn.Module:
    model = convert(dense.tiny(dtype=torch.float32, depth=5), plan).eval()
    with torch.no_grad():
        for parameter in new_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def operators(model: nn.Module) -> list[LinformerAttention]:
    return [cast(LinformerAttention, layer.operator) for layer in converted_layers(model).values()]


def images(size: tuple[int, int] | None = None) -> Tensor:
    return dense.images(2, dtype=torch.float32, **({} if size is None else {"size": size}))


@pytest.mark.parametrize(
    "options",
    [{}, {"sharing": "key-value"}, {"sharing": "layerwise", "num_keys": 5}, {"stochastic": True}],
    ids=str,
)
def test_the_output_is_the_equation_of_linformer(options: dict[str, Any]) -> None:
    operator, heads = Case("linformer", options).build(GRID), draw(GRID, size=2)
    q, k, v = heads.qkv()
    learned = [cast(Tensor, getattr(operator, f"{name}_pooling")) for name in ("key", "value")]
    keys_Mn = learned[0].softmax(1) if options.get("stochastic") else learned[0]
    values_Mn = keys_Mn if learned[1] is None else learned[1]
    values_Mn = values_Mn.softmax(1) if options.get("stochastic") and learned[1] is not None else values_Mn
    out = []
    for query in range(GRID.num_tokens):
        if query < 2:
            logits, values = heads.scale * (q[:, :, query, None] * k).sum(-1), v
        else:
            spread = [max(1.0, float(row.sum() ** 2 / (row**2).sum())) for row in keys_Mn.detach()]
            counts = torch.tensor([1.0, 1.0, *spread]).double().log()
            keys = torch.cat((k[:, :, :2], torch.einsum("mn,bhnd->bhmd", keys_Mn, k[:, :, 2:])), 2)
            logits = heads.scale * (q[:, :, query, None] * keys).sum(-1) + counts
            values = torch.cat((v[:, :, :2], torch.einsum("mn,bhnd->bhmd", values_Mn, v[:, :, 2:])), 2)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        out.append((weights[..., None] * values).sum(2))
    torch.testing.assert_close(operator(heads), torch.stack(out, 2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sharing", ["headwise", "key-value", "layerwise"])
def test_with_a_key_for_each_patch_it_is_softmax(sharing: str) -> None:
    operator, heads = build_linformer(num_keys=48, sharing=sharing).double(), draw(GRID, size=3)
    exact = softmax_rows(heads, slice(None))
    torch.testing.assert_close(operator.matrix(heads), exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("stochastic", [False, True])
def test_it_starts_as_means_of_a_grid_of_cells(stochastic: bool) -> None:
    geometry = Geometry(1, (14, 14))
    keys, values = build_linformer(geometry, stochastic=stochastic).pooling(geometry)
    assert keys.shape == values.shape == (49, 196)
    torch.testing.assert_close(keys.sum(1), torch.ones(49))
    own = keys.reshape(7, 7, 7, 2, 7, 2)
    inside = torch.stack([own[i, j, i, :, j, :].sum() for i in range(7) for j in range(7)])
    assert (inside > (0.98 if stochastic else 0.9999)).all()
    assert (keys > 0).all() == stochastic


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_at_the_start_it_is_softmax_where_keys_and_values_are_equal_in_each_cell(prefix: int) -> None:
    """Only with the log of the counts: cells of 4 and of 2 tokens here, and prefix tokens of one."""
    geometry = Geometry(prefix, (5, 4))
    heads = coarse(geometry, (3, 2))
    _, _, v = heads.qkv()
    operator = build_linformer(geometry, num_keys=6).double()
    exact = softmax_rows(heads, slice(None)) @ v
    torch.testing.assert_close(operator(heads), exact, rtol=1e-6, atol=1e-7)


def test_counts_follow_what_is_learned() -> None:
    """A row that comes to look at one token counts as one, not as the cell that it started from."""
    operator, heads = build_linformer(num_keys=4).double(), draw(GRID)
    q, k, v = heads.qkv()
    assert operator.key_pooling is not None
    with torch.no_grad():
        for pooling in operator.parameters():
            pooling.zero_()[range(4), [3, 9, 20, 41]] = 1.0
    chosen = torch.tensor([0, 1, 5, 11, 22, 43])
    logits = heads.scale * q[:, :, 2:] @ k[:, :, chosen].transpose(2, 3)
    torch.testing.assert_close(operator(heads)[:, :, 2:], logits.softmax(-1) @ v[:, :, chosen])


def test_a_row_of_zeros_has_a_gradient() -> None:
    operator, heads = build_linformer(num_keys=4).double(), draw(GRID)
    with torch.no_grad():
        for pooling in operator.parameters():
            pooling[1] = 0
    out = operator(heads)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(cast(Tensor, p.grad).isfinite().all() for p in operator.parameters())


@pytest.mark.parametrize("stochastic", [False, True])
def test_rows_of_a_resampled_pooling_sum_to_one_only_if_stochastic(stochastic: bool) -> None:
    geometry = Geometry(2, (9, 12))
    operator = Case("linformer", {"stochastic": stochastic}).build(GRID)
    operator.resample(geometry)
    assert cast(Tensor, operator.key_pooling).shape[1] == geometry.num_patches
    out = operator.matrix(draw(geometry)).sum(-1)
    assert torch.allclose(out, torch.ones_like(out)) == stochastic


def test_rows_keep_their_sum_on_a_grid_one_and_a_half_times_as_large() -> None:
    """Without n_old / n_new they would sum to 2.25; at the border bilinear weights make it inexact."""
    means = build_linformer(Geometry(0, (8, 12)), num_keys=24).pooling(Geometry(0, (12, 18)))[0]
    torch.testing.assert_close(means.sum(1), torch.ones(24), rtol=0.15, atol=0)
    assert means.sum().item() == pytest.approx(24, rel=1e-4)
    image = torch.arange(12.0).reshape(1, 12).expand(2, 12)
    torch.testing.assert_close(interpolated(image, (1, 12), (3, 12)), image.repeat(1, 3) / 3)
    torch.testing.assert_close(interpolated(image, (12, 1), (12, 3))[0, 1::3] * 3, image[0])


def test_no_weight_is_lost_on_a_grid_a_third_as_large() -> None:
    """Plain bilinear interpolation would look at four of nine tokens."""
    sums = interpolated(torch.eye(144), (12, 12), (4, 4)).sum(1)
    assert float(sums.min()) > 0.3
    assert float(sums.mean()) == pytest.approx(1)


def test_a_resampled_start_is_the_start_on_the_other_grid() -> None:
    """Cells of 2x2 tokens stretched to 3x3: the same cells, softened at their edges."""
    operator, other = (
        build_linformer(Geometry(1, (8, 12))),
        build_linformer(Geometry(1, (12, 18)), num_keys=24),
    )
    found = operator.pooling(Geometry(1, (12, 18)))[0]
    wanted = other.pooling(Geometry(1, (12, 18)))[0]
    assert found.shape == wanted.shape
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.5
    assert torch.equal(found.argmax(1), (found * (wanted > 0)).argmax(1))


def test_one_pooling_for_all_layers_with_the_same_options() -> None:
    model = student()
    names = [name for name, _ in model.named_parameters() if "pooling" in name]
    assert names == ["blocks.0.attn.operator.key_pooling", "blocks.3.attn.operator.key_pooling"]
    assert [key for key in model.state_dict() if "pooling" in key] == names
    first, _, _, other, last = operators(model)
    geometry = first.shape.geometry
    before = model(images())
    with torch.no_grad():
        cast(Tensor, first.key_pooling).mul_(0.5)
    assert torch.equal(first.pooling(geometry)[0], last.pooling(geometry)[0])
    assert not torch.equal(before, model(images()))
    assert other.pooling(geometry)[0].shape != first.pooling(geometry)[0].shape


def test_the_shared_pooling_learns_from_every_layer() -> None:
    """Its gradient is the sum of those of layers that have the same pooling each for itself."""
    shared = student("*: linformer(sharing=layerwise)")
    alone = copy.deepcopy(shared)
    for operator in operators(alone)[1:]:
        operator._first = (copy.deepcopy(operators(alone)[0]),)
    gradients = []
    for model in (shared, alone):
        kept = [operator._first[0] if operator._first else operator for operator in operators(model)]
        poolings = list({id(owner): cast(Tensor, owner.key_pooling) for owner in kept}.values())
        loss = cast(Any, model).forward_features(images()).square().sum()
        gradients.append(torch.autograd.grad(loss, poolings))
    assert [len(found) for found in gradients] == [1, 5]
    assert all(found.any() for found in gradients[1])
    torch.testing.assert_close(gradients[0][0], torch.stack(gradients[1]).sum(0), rtol=1e-3, atol=1e-5)


def test_a_copy_shares_with_itself_alone() -> None:
    model = student()
    twin = copy.deepcopy(model)
    assert operators(twin)[1]._first == (operators(twin)[0],)
    expected = model(images())
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        cast(Tensor, operators(twin)[0].key_pooling).zero_()
    assert torch.equal(model(images()), expected)
    assert not torch.allclose(twin(images()), expected)


def test_shared_pooling_is_moved_with_the_model() -> None:
    model = student().double()
    geometry = operators(model)[0].shape.geometry
    assert {operator.pooling(geometry)[0].dtype for operator in operators(model)} == {torch.float64}
    assert model(images().double()).dtype == torch.float64


def test_shared_pooling_is_saved_once_and_loaded(tmp_path: Path) -> None:
    model = student()
    name, arguments = dense.FAMILIES["vit"]
    arguments = {**dense.TINY, **arguments, "depth": 5}
    save_model(model, str(tmp_path / "w.safetensors"))
    again = timm.create_model("graftvit_converted", architecture=name, plan=plan_of(model), **arguments)
    load_model(again, str(tmp_path / "w.safetensors"))
    assert torch.equal(again.eval()(images()), model(images()))
    folder = save_folder(model, tmp_path / "student", name, arguments)
    loaded = loading.load(folder)
    assert torch.equal(loaded(images()), model(images()))
    assert operators(loaded)[4]._first == (operators(loaded)[0],)
    resize(model, (48, 72))
    assert torch.equal(loading.load(folder, img_size=(48, 72))(images((48, 72))), model(images((48, 72))))


def test_a_resized_model_shares_still(tmp_path: Path) -> None:
    model = student()
    size = (48, 72)
    resize(model, size)
    first = operators(model)[0]
    assert cast(Tensor, first.key_pooling).shape[1] == first.shape.geometry.num_patches
    assert [operator.shape.geometry for operator in operators(model)] == [first.shape.geometry] * 5
    assert operators(model)[2].pooling(first.shape.geometry)[0].shape == cast(Tensor, first.key_pooling).shape
    assert model(images(size)).isfinite().all()


def test_other_sharing_is_of_a_layer_alone() -> None:
    for sharing, count in (("headwise", 2), ("key-value", 1)):
        model = student(f"*: linformer(sharing={sharing})")
        assert len(new_parameters(model)) == 5 * count
        assert len({id(parameter) for parameter in new_parameters(model)}) == 5 * count
