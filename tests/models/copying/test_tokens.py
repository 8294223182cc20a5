"""Matching tokens by kind, and moving attention between patch grids."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.copying.grids import GridRule, TokenMatch, interpolate_tokens, match_tokens
from graftvit.models.errors import TransferError
from graftvit.models.families import TokenLayout
from hypothesis import given
from hypothesis import strategies as st

GRID = (2, 3)
KINDS = ["cls", "dist", "reg0", "reg1", "reg2"]
PREFIXES = st.lists(st.sampled_from(KINDS), unique=True).map(
    lambda kinds: tuple(sorted(kinds, key=KINDS.index))
)


def layout(*prefix: str, grid: tuple[int, int] = GRID) -> TokenLayout:
    return TokenLayout(tuple(prefix), grid)


def places(match: TokenMatch, teacher: int, student: int) -> tuple[list[int], list[int]]:
    """The matched tokens of sequences of these lengths."""
    return match.teacher.index(teacher), match.student.index(student)


@pytest.mark.parametrize("prefix", [(), ("cls",), ("cls", "reg0", "reg1", "reg2", "reg3")])
@pytest.mark.parametrize("copy", [True, False])
def test_equal_layouts_take_the_fast_path(prefix: tuple[str, ...], copy: bool) -> None:
    match = match_tokens(layout(*prefix), layout(*prefix), GridRule(copy=copy, interpolate=False))
    assert (match.teacher.whole, match.student.whole, match.student_only, match.report) == (
        True,
        True,
        (),
        (),
    )


def test_teacher_registers_are_left_out_and_said() -> None:
    match = match_tokens(layout("cls", "reg0", "reg1"), layout("cls"), GridRule(copy=True, interpolate=False))
    assert places(match, 9, 7) == ([0, 3, 4, 5, 6, 7, 8], list(range(7)))
    assert match.student.whole
    assert match.student_only == ()
    assert len(match.report) == 1
    assert "reg0, reg1" in match.report[0]


def test_student_tokens_without_a_counterpart_are_listed() -> None:
    match = match_tokens(layout("cls"), layout("cls", "dist", "reg0"), GridRule(copy=True, interpolate=False))
    assert match.teacher.whole
    assert places(match, 7, 9) == (list(range(7)), [0, 3, 4, 5, 6, 7, 8])
    assert match.student_only == (1, 2)
    assert "dist, reg0" in match.report[0]


def test_kinds_decide_not_positions() -> None:
    match = match_tokens(
        layout("reg0", "cls"), layout("cls", "reg0", "reg1"), GridRule(copy=False, interpolate=False)
    )
    assert places(match, 8, 9) == ([1, 0, 2, 3, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6, 7, 8])


def test_no_prefix_in_common_leaves_the_patches() -> None:
    match = match_tokens(layout("cls"), layout("reg0"), GridRule(copy=False, interpolate=False))
    assert places(match, 7, 7) == (list(range(1, 7)), list(range(1, 7)))
    assert match.student_only == (0,)
    assert len(match.report) == 2


@given(PREFIXES, PREFIXES)
def test_matched_tokens_are_of_one_kind_and_place(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    teacher, student = layout(*one), layout(*other)
    match = match_tokens(teacher, student, GridRule(copy=True, interpolate=False))
    names_t, names_s = ([*side.prefix, *map(str, range(6))] for side in (teacher, student))
    indices_t, indices_s = places(match, teacher.num_tokens, student.num_tokens)
    for tokens, indices, length in (
        (match.teacher, indices_t, teacher.num_tokens),
        (match.student, indices_s, student.num_tokens),
    ):
        sequence = torch.arange(2 * length).view(2, length)
        assert torch.equal(tokens.pick(sequence, 1), sequence[:, indices])
    assert [names_t[i] for i in indices_t] == [names_s[i] for i in indices_s]
    assert sorted([*indices_s, *match.student_only]) == list(range(student.num_tokens))
    assert {names_t[i] for i in indices_t} == set(names_t) & set(names_s)


@pytest.mark.parametrize("interpolate", [True, False])
def test_copy_refuses_unequal_grids(interpolate: bool) -> None:
    with pytest.raises(TransferError, match=r"2x3.*4x4.*teacher\.img_size"):
        match_tokens(layout("cls"), layout("cls", grid=(4, 4)), GridRule(copy=True, interpolate=interpolate))


def test_equal_counts_on_other_grids_are_refused_too() -> None:
    with pytest.raises(TransferError, match=r"2x3.*3x2"):
        match_tokens(layout("cls"), layout("cls", grid=(3, 2)), GridRule(copy=True, interpolate=False))


def test_distillation_interpolates_only_when_asked() -> None:
    with pytest.raises(TransferError, match=r"transfer\.interpolate_grid=true"):
        match_tokens(layout("cls"), layout("cls", grid=(4, 4)), GridRule(copy=False, interpolate=False))
    match = match_tokens(layout("cls"), layout("cls", grid=(4, 4)), GridRule(copy=False, interpolate=True))
    assert (match.teacher.whole, match.student.whole) == (True, True)
    assert "interpolated" in match.report[0]


def test_indices_refer_to_the_interpolated_teacher() -> None:
    match = match_tokens(
        layout("cls", "reg0"), layout("cls", grid=(4, 4)), GridRule(copy=False, interpolate=True)
    )
    assert places(match, 18, 17) == ([0, *range(2, 18)], list(range(17)))


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
def test_interpolating_q_and_k_interpolates_logits_over_both_axes(
    old: tuple[int, int], new: tuple[int, int], num_prefix: int
) -> None:
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
