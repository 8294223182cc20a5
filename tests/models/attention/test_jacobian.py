"""Rows of the Jacobian: those of the map where there is one, and autograd's where there is none."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention.base import Geometry, Heads, jacobian_rows
from graftvit.models.errors import UnsupportedModelError
from support.models.operator_cases import Case, draw
from torch import Tensor

SMALL = Geometry(1, (3, 4))
INDEX = torch.tensor([5, 0, 12])


@pytest.mark.parametrize(
    "case", [Case("softmax"), Case("linear"), Case("window", {"window": 2}), Case("monarch")]
)
def test_of_a_linear_operator_they_are_its_map(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL, width=4)
    rows = jacobian_rows(operator, heads, INDEX)
    torch.testing.assert_close(rows, operator.matrix(heads)[:, :, INDEX], rtol=1e-10, atol=1e-12)
    assert not rows.requires_grad


def test_they_are_the_mean_of_autograds_jacobian_over_channels() -> None:
    operator, heads = Case("ttt").build(SMALL, width=4), draw(SMALL, batch=1, width=4)
    q, k, v = heads.qkv()

    def out(values: Tensor) -> Tensor:
        return operator(heads.with_qkv(q, k, values))

    whole = torch.autograd.functional.jacobian(out, v)
    for head in range(2):
        same = whole[0, head, :, :, 0, head]  # (N, D, N, D)
        dense = torch.stack([same[:, c, :, c] for c in range(4)]).mean(0)
        assert dense.abs().max() > 1e-6
        torch.testing.assert_close(operator.matrix(heads)[0, head], dense, rtol=1e-9, atol=1e-14)
        assert not whole[0, head, :, :, 0, 1 - head].any(), "heads see each other's values"


def test_they_need_no_gradient_mode_and_leave_none() -> None:
    operator, heads = Case("ttt").build(SMALL, width=4), draw(SMALL, width=4)
    with torch.no_grad():
        rows = operator.rows(heads, INDEX)
    assert rows.shape == (2, 2, 3, 13)
    assert all(parameter.grad is None for parameter in operator.parameters())
    torch.testing.assert_close(rows, operator.matrix(heads)[:, :, INDEX])
    assert operator.rows(heads, INDEX[:0]).shape == (2, 2, 0, 13)


def test_there_are_no_terms_where_there_is_no_map() -> None:
    operator, heads = Case("ttt").build(SMALL), draw(SMALL)
    with pytest.raises(UnsupportedModelError, match="not linear in V"):
        operator.terms(heads)


def test_the_values_are_as_they_were() -> None:
    operator, heads = Case("linear").build(SMALL), draw(SMALL)
    _, _, v = heads.qkv()
    v.requires_grad_()
    jacobian_rows(operator, Heads(*heads.qkv(), None, heads.scale, geometry=SMALL), INDEX)
    assert v.grad is None
