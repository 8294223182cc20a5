"""Nyströmformer: its equation, its limits, its pseudo-inverse, and parity with a public version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads, LayerShape
from graftvit.models.attention.nystrom import NystromAttention, pseudo_inverse
from graftvit.models.attention.pooling import Pooling, pooling_macs
from graftvit.models.attention.softmax import softmax_rows
from graftvit.models.errors import ConfigError
from support.models.operator_cases import Case, coarse, draw
from torch import Tensor

GRID = Geometry(2, (6, 8))


def build(geometry: Geometry = GRID, heads: int = 2, **options: Any) -> NystromAttention:
    return NystromAttention(LayerShape(heads, 8, geometry), **options).double()


def spiky(geometry: Geometry) -> Heads:
    """Every token looks at itself most of all, so that the small map is far from singular."""
    heads = draw(geometry)
    q, _, v = heads.qkv()
    unit = q / q.norm(dim=-1, keepdim=True)
    return heads.with_qkv(4 * unit, 4 * unit, v)


@pytest.mark.parametrize("iterations", [1, 6])
def test_the_output_is_the_equation(iterations: int) -> None:
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
        matrix = build(num_landmarks=48, iterations=iterations).matrix(heads)
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
    matrix = build(geometry, num_landmarks=6, iterations=60).matrix(heads)
    torch.testing.assert_close(matrix, exact, rtol=1e-6, atol=1e-8)


def test_prefix_rows_are_exact() -> None:
    heads = draw(GRID, size=3)
    matrix = build(num_landmarks=4).matrix(heads)
    torch.testing.assert_close(matrix[:, :, :2], softmax_rows(heads, slice(2)))


def test_rows_sum_to_one_when_the_inverse_has_converged() -> None:
    heads = spiky(GRID)
    rough, fine = (build(num_landmarks=6, iterations=i).matrix(heads).sum(-1) for i in (6, 20))
    torch.testing.assert_close(fine, torch.ones_like(fine), rtol=1e-8, atol=0)
    assert 1e-3 < float((rough - 1).abs().max()) < 0.1


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
    out = build(num_landmarks=12, iterations=iterations).float()(blank)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), rtol=1e-4, atol=1e-5)


def test_other_matrices_of_the_batch_do_not_change_an_inverse() -> None:
    """Public versions scale all of a batch by its largest norm; here each matrix has its own."""
    x = (torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()).softmax(-1)
    x[1] = torch.eye(9) * 0.2 + 0.8 * torch.eye(9)[:1]
    assert torch.equal(pseudo_inverse(x, 6)[:1], pseudo_inverse(x[:1], 6))


def test_hidden_tokens_have_no_say_as_queries_either() -> None:
    operator, heads = build(num_landmarks=12, local_size=3), draw(GRID)
    assert operator.conv is not None
    torch.nn.init.normal_(operator.conv.weight)
    q, k, v = heads.qkv()
    heads.key_mask = torch.ones(2, 50, dtype=torch.bool)
    heads.key_mask[:, 0] = False
    heads.key_mask[:, [2, 3, 10, 11]] = False  # all of the first cell
    assert not Pooling(heads, (3, 4), k).means(k)[:, :, 0].any()
    hidden = ~heads.key_mask[:, None, :, None]
    out = operator(heads)
    changed = operator(heads.with_qkv(*(x.masked_fill(hidden, 9.0) for x in (q, k, v))))
    assert out.isfinite().all()
    seen = heads.key_mask[0]
    torch.testing.assert_close(changed[:, :, seen], out[:, :, seen], rtol=1e-10, atol=1e-12)
    assert not operator.matrix(heads)[..., ~seen].any()


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
    operator = build(geometry, 1, num_landmarks=num_landmarks, iterations=iterations, local_size=0)
    found = operator(Heads(q, k, v, None, 8**-0.5, geometry=geometry))
    torch.testing.assert_close(found[:, 0], module(x), rtol=1e-7, atol=1e-9)


def test_any_grid_has_as_many_landmarks() -> None:
    """Nothing is tied to the grid: 7x9 cells at most of what was asked for, and all tokens of a small grid."""
    operator = build(num_landmarks=12)
    for grid, cells in (((9, 12), (3, 4)), ((12, 9), (4, 3)), ((2, 3), (2, 3)), ((1, 40), (1, 12))):
        geometry = Geometry(2, grid)
        assert operator.cells(geometry) == cells
        before = operator(draw(geometry))
        operator.resample(geometry)
        assert torch.equal(operator(draw(geometry)), before)
    assert operator.traits.resolution == "free"


def test_it_starts_without_its_convolution() -> None:
    heads = draw(GRID)
    local: Tensor | None = build().local(heads)
    assert local is not None
    assert not local.any()
    assert build(local_size=0).local(heads) is None
    assert not list(build(local_size=0).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_landmarks": 49}, "num_landmarks=49; give a whole number from 1 to 48"),
        ({"iterations": 0}, "iterations=0; give a whole number from 1 to 100"),
        ({"iterations": 101}, "iterations=101; give a whole number from 1 to 100"),
        ({"iterations": 2.5}, "iterations=2.5"),
        ({"local_size": 4}, "local_size=4"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"plan: {message}"):
        build(**options)


@pytest.mark.parametrize(("grid", "landmarks", "ratio"), [
    ((14, 14), 16, 0.19), ((14, 14), 49, 1.10), ((14, 14), 64, 1.97), ((32, 32), 64, 0.17), ((32, 32), 49, 0.12),
])  # fmt: skip
def test_the_cost_against_softmax(grid: tuple[int, int], landmarks: int, ratio: float) -> None:
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
