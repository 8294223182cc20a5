"""Heads and tokens at known places, against index tensors."""

from __future__ import annotations

import torch
from graftvit.models.copying.grids import pick_dim, put_dim, runs_of
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
    for y, z in zip(
        *(torch.autograd.grad(y, (part, whole), upstream, materialize_grads=True) for y in (found, wanted)),
        strict=True,
    ):
        assert torch.equal(y, z)
