"""Heads and tokens at known places, tokens matched by kind, and attention moved between grids."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.copying.grids import (
    GridRule,
    TokenMatch,
    interpolate_tokens,
    match_tokens,
    pick_dim,
    put_dim,
    runs_of,
)
from graftvit.models.errors import TransferError
from graftvit.models.families import TokenLayout
from hypothesis import given
from hypothesis import strategies as st


def test_runs() -> None:
    assert runs_of([4, 5, 0, 2, 3, 3]) == [(4, 6), (0, 1), (2, 4), (3, 4)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.sampled_from([0, 1]))
def test_picking_with_repetition(index: list[int], dim: int) -> None:
    x = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    found, wanted = pick_dim(x, dim, index), x.index_select(dim, torch.tensor(index))
    assert torch.equal(found, wanted)
    upstream = torch.randn_like(wanted)
    gradients = (torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted))
    assert torch.allclose(*gradients, atol=1e-14)


@given(st.permutations(range(7)), st.integers(1, 7), st.sampled_from([0, 1]))
def test_replacing(order: list[int], count: int, dim: int) -> None:
    index, whole = order[:count], torch.randn(7, 7, requires_grad=True)
    part = torch.randn(whole.index_select(dim, torch.tensor(index)).shape, requires_grad=True)
    found, wanted = put_dim(part, whole, dim, index), whole.index_copy(dim, torch.tensor(index), part)
    assert torch.equal(found, wanted)
    upstream = torch.randn_like(wanted)
    sides = (torch.autograd.grad(y, (part, whole), upstream, materialize_grads=True) for y in (found, wanted))
    assert all(map(torch.equal, *sides))


# Matching tokens by kind, and moving attention between patch grids.


GRID = (2, 3)
KINDS = ["cls", "dist", "reg0", "reg1", "reg2"]
PREFIXES = st.lists(st.sampled_from(KINDS), unique=True).map(
    lambda kinds: tuple(sorted(kinds, key=KINDS.index))
)


def layout(*prefix: str, grid: tuple[int, int] = GRID) -> TokenLayout:
    return TokenLayout(tuple(prefix), grid)


def match(
    teacher: TokenLayout, student: TokenLayout, copy: bool = True, interpolate: bool = False
) -> TokenMatch:
    return match_tokens(teacher, student, GridRule(copy=copy, interpolate=interpolate))


def places(match: TokenMatch, teacher: int, student: int) -> tuple[list[int], list[int]]:
    """The matched tokens of sequences of these lengths."""
    return match.teacher.index(teacher), match.student.index(student)


@pytest.mark.parametrize("prefix", [(), ("cls",), ("cls", "reg0", "reg1", "reg2", "reg3")])
@pytest.mark.parametrize("copy", [True, False])
def test_equal_layouts_take_the_fast_path(prefix: tuple[str, ...], copy: bool) -> None:
    found = match(layout(*prefix), layout(*prefix), copy)
    assert (found.teacher.whole, found.student.whole) == (True, True)
    assert (found.student_only, found.report) == ((), ())


@pytest.mark.parametrize(("teacher", "student", "found", "alone", "reports"), [
    ("cls reg0 reg1", "cls", ([0, 3, 4, 5, 6, 7, 8], list(range(7))), (), ["reg0, reg1"]),
    ("cls", "cls dist reg0", (list(range(7)), [0, 3, 4, 5, 6, 7, 8]), (1, 2), ["dist, reg0"]),
    ("reg0 cls", "cls reg0 reg1", ([1, 0, 2, 3, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6, 7, 8]), (2,), ["reg1"]),
    ("cls", "reg0", (list(range(1, 7)), list(range(1, 7))), (0,), ["cls", "reg0"]),
])  # fmt: skip
def test_tokens_are_matched_by_kind(
    teacher: str, student: str, found: tuple[list[int], list[int]], alone: tuple[int, ...], reports: list[str]
) -> None:
    theirs, ours = teacher.split(), student.split()
    matched = match(layout(*theirs), layout(*ours), copy=len(reports) < 2)
    assert places(matched, len(theirs) + 6, len(ours) + 6) == found
    assert matched.student_only == alone
    assert len(matched.report) == len(reports)
    assert all(words in each for words, each in zip(reports, matched.report, strict=True))


@given(PREFIXES, PREFIXES)
def test_matched_tokens_are_of_one_kind_and_place(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    teacher, student = layout(*one), layout(*other)
    found = match(teacher, student)
    names_t, names_s = ([*side.prefix, *map(str, range(6))] for side in (teacher, student))
    indices_t, indices_s = places(found, teacher.num_tokens, student.num_tokens)
    for tokens, indices, length in (
        (found.teacher, indices_t, teacher.num_tokens),
        (found.student, indices_s, student.num_tokens),
    ):
        sequence = torch.arange(2 * length).view(2, length)
        assert torch.equal(tokens.pick(sequence, 1), sequence[:, indices])
    assert [names_t[i] for i in indices_t] == [names_s[i] for i in indices_s]
    assert sorted([*indices_s, *found.student_only]) == list(range(student.num_tokens))
    assert {names_t[i] for i in indices_t} == set(names_t) & set(names_s)


@pytest.mark.parametrize(("grid", "copy", "interpolate", "words"), [
    ((4, 4), True, True, r"2x3.*4x4.*teacher\.img_size"), ((4, 4), True, False, r"2x3.*4x4.*teacher\.img_size"),
    ((3, 2), True, False, r"2x3.*3x2"), ((4, 4), False, False, r"transfer\.interpolate_grid=true"),
])  # fmt: skip
def test_unequal_grids_are_refused(grid: tuple[int, int], copy: bool, interpolate: bool, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        match(layout("cls"), layout("cls", grid=grid), copy, interpolate)


def test_distillation_interpolates_when_asked() -> None:
    found = match(layout("cls"), layout("cls", grid=(4, 4)), copy=False, interpolate=True)
    assert (found.teacher.whole, found.student.whole) == (True, True)
    assert "interpolated" in found.report[0]
    found = match(layout("cls", "reg0"), layout("cls", grid=(4, 4)), copy=False, interpolate=True)
    assert places(found, 18, 17) == ([0, *range(2, 18)], list(range(17)))


def interpolation_matrix(num_prefix: int, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """R as a dense matrix: the identity for prefix tokens, separable linear weights for patches."""

    def weights(source: int, target: int) -> torch.Tensor:
        matrix = torch.zeros(target, source, dtype=torch.float64)
        for row in range(target):
            place = min(max((row + 0.5) * source / target - 0.5, 0.0), source - 1.0)
            low = min(int(place), source - 1)
            matrix[row, low] += 1 - (place - low)
            matrix[row, min(low + 1, source - 1)] += place - low
        return matrix

    patches = torch.kron(weights(old[0], new[0]), weights(old[1], new[1]))
    return torch.block_diag(torch.eye(num_prefix, dtype=torch.float64), patches)


@pytest.mark.parametrize(
    ("old", "new"), [((2, 3), (4, 5)), ((5, 4), (2, 3)), ((1, 4), (3, 2)), ((3, 3),) * 2]
)
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_interpolating_q_and_k(old: tuple[int, int], new: tuple[int, int], num_prefix: int) -> None:
    tokens = num_prefix + old[0] * old[1]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, tokens, 4, dtype=torch.float64, generator=generator).unbind(0)
    matrix = interpolation_matrix(num_prefix, old, new)
    q_new, k_new = (interpolate_tokens(x, num_prefix, old, new) for x in (q, k))
    torch.testing.assert_close(q_new, matrix @ q)
    torch.testing.assert_close(q_new @ k_new.transpose(-2, -1), matrix @ (q @ k.transpose(-2, -1)) @ matrix.T)


def test_prefix_tokens_are_kept_and_gradients_flow() -> None:
    q = torch.randn(1, 2, 2 + 4, 3, requires_grad=True)
    result = interpolate_tokens(q, 2, (2, 2), (3, 4))
    assert result.shape == (1, 2, 2 + 12, 3)
    assert torch.equal(result[:, :, :2], q[:, :, :2])
    result.sum().backward()
    assert q.grad is not None
    assert q.grad.ne(0).all()


def test_the_method_that_needs_equal_grids_is_named() -> None:
    rule = GridRule(copy=True, method="block_output")
    with pytest.raises(TransferError, match=r"transfer\.method=block_output needs equal grids"):
        rule.check((4, 4), (3, 2))
