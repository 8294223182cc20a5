"""The factored Frobenius distance against the dense one, for every operator that has a map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftvit.models.attention.base import FirstRows, Geometry, Heads, LowRank, Sparse, Term, term_rows
from graftvit.models.attention.softmax import softmax_rows
from graftvit.transfer.recovery.align import inner, squared_distance
from support.models.operator_cases import CASES, Case, draw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GEOMETRY = Geometry(1, (5, 7))
LINEAR = [case for case in CASES if case.build(GEOMETRY).traits.linear_in_v]


def dense(term: Term, heads: Heads) -> Tensor:
    return term_rows(term, torch.arange(GEOMETRY.num_tokens), heads)


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_distance_is_the_dense_one(case: Case, with_bias: bool) -> None:
    operator, heads, teacher = case.build(GEOMETRY), draw(GEOMETRY), draw(GEOMETRY, seed=1, size=2)
    if with_bias:
        teacher.bias = torch.randn(2, GEOMETRY.num_tokens, GEOMETRY.num_tokens, dtype=torch.float64)
    q, k, _ = (x.requires_grad_() for x in heads.qkv())
    found = squared_distance(teacher, operator.terms(heads))
    wanted = (softmax_rows(teacher, slice(None)) - operator.matrix(heads)).square().sum((2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    if not found.requires_grad:  # uniform attention has no queries and keys
        return
    inputs = [q, k, *operator.parameters()]
    gradients = [torch.autograd.grad(x.sum(), inputs, allow_unused=True) for x in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


SPARSE = [
    case for case in LINEAR if any(isinstance(t, Sparse) for t in case.build(GEOMETRY).terms(draw(GEOMETRY)))
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_large_logits_in_half_precision(case: Case, with_bias: bool) -> None:
    half, operator = torch.bfloat16, case.build(GEOMETRY).float()
    student = draw(GEOMETRY)
    student = student.with_qkv(*(x.float() for x in student.qkv()))
    q, k, v = (60 * x.to(half) for x in draw(GEOMETRY, seed=1, size=2).qkv())
    bias = None
    if with_bias:
        bias = 99 * torch.randn(2, *2 * (GEOMETRY.num_tokens,), generator=torch.Generator().manual_seed(0))
    teacher = Heads(q, k, v, None if bias is None else bias.to(half), 0.3)
    exact = Heads(q.double(), k.double(), v.double(), None if bias is None else bias.to(half).double(), 0.3)
    with torch.autocast("cpu", half):
        found = squared_distance(teacher, operator.terms(student))
    wanted = (softmax_rows(exact, slice(None)) - operator.matrix(student)).square().sum((2, 3))
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-2, atol=1e-2)


def test_inner_products_of_all_kinds_of_terms() -> None:
    heads, tokens = draw(GEOMETRY), GEOMETRY.num_tokens
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    index = torch.randint(tokens, (tokens, 4), generator=generator)
    other = torch.randint(tokens, (tokens, 3), generator=generator)
    terms: list[Term] = [
        LowRank(random(2, 2, tokens, 3), random(2, 2, tokens, 3)),
        LowRank(random(2, 2, tokens, 5), random(2, 2, tokens, 5)),
        Sparse(random(2, 2, tokens, 4), index),
        Sparse(random(2, 2, tokens, 3), other),
        FirstRows(random(2, 2, 2, tokens)),
    ]
    for a in terms:
        for b in terms:
            torch.testing.assert_close(inner(a, b), (dense(a, heads) * dense(b, heads)).sum((2, 3)))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


RANKS: dict[str, Any] = {
    "linformer": {"num_keys": 16},
    "nystrom": {"num_landmarks": 16},
    "agent": {"num_agents": 16},
    "hilo": {"alpha": 0},
}
"""By default these grow with the grid."""
CHEAP = sorted({case.operator for case in LINEAR if case.build(GEOMETRY).traits.linear_cost} - {"uniform"})


@pytest.mark.parametrize("name", CHEAP)
def test_memory_is_linear_in_the_number_of_tokens(name: str) -> None:
    """Four times the tokens take about four times the memory; a map would be sixteen times as large."""
    largest = []
    for side in (14, 28):
        geometry = Geometry(1, (side, side))
        heads = draw(geometry, torch.float32, batch=1)
        operator = Case(name, RANKS.get(name, {})).build(geometry, torch.float32)
        q, _, _ = (x.requires_grad_() for x in heads.qkv())
        with Largest() as mode:
            distance = squared_distance(draw(geometry, torch.float32, batch=1, seed=1), operator.terms(heads))
            distance.sum().backward()
        assert q.grad is not None
        largest.append(mode.elements)
    assert largest[1] <= 6 * largest[0]
