"""The grammar of `transfer.heads`, and the assignment of heads by measured map distance."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.copying.tape import HeadMap
from graftvit.models.errors import TransferError
from graftvit.transfer.methods import heads as heads_module
from graftvit.transfer.methods.heads import map_distance, match_heads, resolve_heads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def test_all_is_the_identity() -> None:
    mapping = resolve_heads("all", 3, 3)
    assert mapping.groups == ((0,), (1,), (2,))
    assert mapping.is_identity
    assert not mapping.is_grouped
    assert mapping.student_heads == (0, 1, 2)


def test_first_heads_of_a_larger_teacher_are_not_the_identity() -> None:
    assert not resolve_heads("0,1", 4, 2).is_identity


def test_subset_leaves_the_other_heads_alone() -> None:
    for heads in ("0,1,4", [4, 0, 1], "0, 1, -2"):
        mapping = resolve_heads(heads, 6, 6)
        assert mapping.groups == ((0,), (1,), None, None, (4,), None)
        assert mapping.student_heads == (0, 1, 4)
        assert mapping.targets == ((0,), (1,), (4,))
        assert not mapping.is_identity


def test_mean_groups_consecutive_teacher_heads() -> None:
    mapping = resolve_heads("mean", 6, 2)
    assert mapping.groups == ((0, 1, 2), (3, 4, 5))
    assert mapping.is_grouped


def test_mean_repeats_the_heads_of_a_smaller_teacher() -> None:
    mapping = resolve_heads("mean", 2, 6)
    assert mapping.groups == ((0,), (0,), (0,), (1,), (1,), (1,))
    assert not mapping.is_grouped


@given(st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_mean_uses_every_teacher_head_equally(small: int, factor: int, teacher_is_larger: bool) -> None:
    teacher, student = (small * factor, small) if teacher_is_larger else (small, small * factor)
    used = [head for group in resolve_heads("mean", teacher, student).targets for head in group]
    assert used == sorted(used)
    assert {used.count(head) for head in range(teacher)} == {1 if teacher_is_larger else factor}
    assert resolve_heads("mean", small, small).is_identity


def test_pairs_and_groups_of_pairs() -> None:
    assert resolve_heads("3>0,1>2", 4, 3).groups == ((3,), None, (1,))
    assert resolve_heads("3>0, 1>0, -1>-1", 4, 2) == HeadMap(((3, 1), (3,)), 4)


@pytest.mark.parametrize(
    ("heads", "teacher", "student", "message"),
    [
        ("all", 6, 3, "'mean'.*'match'"),
        ("mean", 6, 4, "teacher has 6 and the student 4"),
        ("mean", 4, 6, "teacher has 4 and the student 6"),
        ("0,6", 6, 6, "head 6"),
        ("0,4", 6, 4, "head 4"),
        ("-1", 6, 4, "from the end"),
        ("1,1", 6, 6, "head 1 more than once"),
        ("1,-5", 6, 6, "head 1 more than once"),
        ("6>0", 6, 4, "head 6 of the teacher"),
        ("0>4", 6, 4, "head 4 of the student"),
        ("1>0,1>0", 6, 4, "head 1 more than once"),
        ("match", 6, 6, "calibration batch"),
        ("maen", 6, 6, "valid: all"),
        ("", 6, 6, "valid: all"),
        ([], 6, 6, "selects no head"),
    ],
)
def test_mistakes_name_the_key(heads: str | list[int], teacher: int, student: int, message: str) -> None:
    with pytest.raises(TransferError, match=message) as caught:
        resolve_heads(heads, teacher, student)
    assert f"transfer.heads={heads!r}" in str(caught.value)


def dense_distance(
    q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor, scale_t: float, scale_s: float
) -> Tensor:
    map_t = (scale_t * q_t.double() @ k_t.double().transpose(-2, -1)).softmax(-1)
    map_s = (scale_s * q_s.double() @ k_s.double().transpose(-2, -1)).softmax(-1)
    return (map_t[:, :, None] - map_s[:, None]).square().sum(-1).mean((0, 3))


@pytest.mark.parametrize("chunk", [1, 200, 2**22])
def test_distance_is_the_dense_one_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_module, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    q_t, k_t = torch.randn(2, 2, 4, 7, 8, generator=generator).unbind(0)
    q_s, k_s = torch.randn(2, 2, 3, 7, 5, generator=generator).unbind(0)
    measured = map_distance(q_t, k_t, q_s, k_s, 0.4, 0.7)
    torch.testing.assert_close(
        measured.double(), dense_distance(q_t, k_t, q_s, k_s, 0.4, 0.7), rtol=1e-5, atol=1e-7
    )


def test_distance_of_a_map_to_itself_is_zero_and_a_bias_counts() -> None:
    q, k = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    bias = torch.zeros(2, 6, 6)
    bias[0, :, 0] = 3.0
    plain = map_distance(q, k, q, k, 0.5, 0.5)
    assert plain.diagonal().eq(0).all()
    biased = map_distance(q, k, q, k, 0.5, 0.5, bias_t=bias)
    assert biased[0, 0] > 0.01
    assert biased[1, 1] == 0
    assert map_distance(q, k, q, k, 0.5, 0.5, bias_t=bias, bias_s=bias).diagonal().eq(0).all()


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [1, 3], [0, 1, 2, 3]])
def test_match_finds_a_permutation_of_heads(order: list[int]) -> None:
    q, k = torch.randn(2, 3, 4, 6, 4, generator=torch.Generator().manual_seed(2)).unbind(0)
    distance = map_distance(q, k, q[:, order], k[:, order], 0.5, 0.5)
    assert match_heads(distance) == HeadMap(tuple((head,) for head in order), 4)


def test_match_leaves_surplus_student_heads_alone() -> None:
    distance = torch.tensor([[5.0, 0.0, 5.0], [5.0, 5.0, 0.1]])
    assert match_heads(distance) == HeadMap((None, (0,), (1,)), 2)


def test_match_minimizes_the_total_not_each_row() -> None:
    assert match_heads(torch.tensor([[0.0, 1.0], [1.0, 10.0]])).groups == ((1,), (0,))


def test_match_refuses_distances_that_are_not_finite() -> None:
    with pytest.raises(TransferError, match="not finite"):
        match_heads(torch.tensor([[float("nan"), 1.0], [1.0, 0.0]]))
