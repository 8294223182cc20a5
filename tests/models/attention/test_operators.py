"""What holds of every operator: its paths agree, and it is what its traits say."""

from __future__ import annotations

import copy

import pytest
import torch
from graftvit.models.attention.base import Geometry, LowRank, Sparse, Term
from graftvit.models.layer_plan import OPERATORS
from graftvit.models.programs.program import FOUND
from support.models.operator_cases import CASES, GRIDS, PREFIXES, Case, draw, identity_values
from torch import Tensor

LAYOUTS = [Geometry(prefix, grid) for prefix, grid in zip(PREFIXES, GRIDS, strict=True)]
SMALL, ODD = Geometry(1, (4, 6)), Geometry(5, (7, 9))
cases = pytest.mark.parametrize("case", CASES, ids=str)
mapped_cases = pytest.mark.parametrize(
    "case", [each for each in CASES if each.build(SMALL).traits.linear_in_v], ids=str
)
masked_cases = pytest.mark.parametrize(
    "case", [each for each in CASES if each.build(SMALL).traits.key_mask], ids=str
)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12)
    assert float(error) <= tolerance


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES} == set(OPERATORS)


def apply_term(term: Term, v_BHND: Tensor) -> Tensor:
    """The term times V, (B, H, N, D)."""
    if isinstance(term, LowRank):
        return term.left @ (term.right.transpose(2, 3) @ v_BHND)
    if isinstance(term, Sparse):
        return torch.einsum("bhns,bhnsd->bhnd", term.weights, v_BHND[:, :, term.index])
    out = term.weights @ v_BHND
    return torch.cat([out, torch.zeros_like(v_BHND[:, :, out.shape[2] :])], 2)


@mapped_cases
@pytest.mark.parametrize(
    ("geometry", "dtype"), [*((each, torch.float64) for each in LAYOUTS), (ODD, torch.float32)], ids=str
)
def test_all_paths_give_the_same(case: Case, geometry: Geometry, dtype: torch.dtype) -> None:
    operator, heads, tolerance = case.build(geometry, dtype), draw(geometry, dtype), TOLERANCES[dtype]
    _, _, v = heads.qkv()
    out, matrix = operator.attend(heads), operator.matrix(heads)
    close(matrix @ v, out, tolerance)
    close(operator.attend(identity_values(heads)), matrix, tolerance)
    close(torch.stack([apply_term(term, v) for term in operator.terms(heads)]).sum(0), out, tolerance)
    index = torch.tensor([0, geometry.num_tokens - 1, geometry.num_tokens // 2])
    close(operator.rows(heads, index), matrix[:, :, index], tolerance)


@mapped_cases
def test_gradients_are_those_of_the_map(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL)
    q, k, v = (x.requires_grad_() for x in heads.qkv())
    inputs = [q, k, v, *operator.parameters()]
    upstream = torch.randn_like(v)
    by_path = torch.autograd.grad(operator.attend(heads), inputs, upstream, allow_unused=True)
    by_map = torch.autograd.grad(operator.matrix(heads) @ v, inputs, upstream, allow_unused=True)
    for path, dense in zip(by_path, by_map, strict=True):
        assert (path is None) == (dense is None)
        if path is not None and dense is not None:
            torch.testing.assert_close(path, dense, rtol=1e-8, atol=1e-10)


@cases
def test_every_parameter_learns(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL)
    operator(heads.with_qkv(*(x.requires_grad_() for x in heads.qkv()))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in operator.parameters())


@mapped_cases
def test_the_map_is_as_declared(case: Case) -> None:
    traits = case.build(SMALL).traits
    maps = [case.build(geometry).matrix(draw(geometry, size=2)) for geometry in LAYOUTS]
    assert traits.nonnegative == all(bool((matrix >= 0).all()) for matrix in maps)
    assert traits.row_stochastic == all(bool((matrix.sum(-1) - 1).abs().max() < 1e-3) for matrix in maps)


@cases
def test_images_do_not_touch_each_other(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL, batch=3)
    q, k, v = heads.qkv()
    whole = operator(heads)
    for image in range(3):
        one = slice(image, image + 1)
        alone = operator(heads.with_qkv(q[one], k[one], v[one]))
        torch.testing.assert_close(whole[one], alone, rtol=1e-10, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_and_close(case: Case, dtype: torch.dtype) -> None:
    """Queries and keys four times as large as a layer norm gives them."""
    geometry = Geometry(1, (14, 14))
    heads = draw(geometry, torch.float32, size=4, width=16)
    q, k, v = (x.to(dtype) for x in heads.qkv())
    reference = case.build(geometry, torch.float32, width=16)
    operator = copy.deepcopy(reference).to(dtype)
    for parameter, rounded in zip(reference.parameters(), operator.parameters(), strict=True):
        parameter.data = rounded.data.float()
    for buffer, rounded in zip(reference.buffers(), operator.buffers(), strict=True):
        buffer.data = rounded.data.to(buffer.dtype)
    out = operator(heads.with_qkv(q, k, v))
    assert out.dtype == dtype
    assert out.isfinite().all()
    wanted = reference(heads.with_qkv(q.float(), k.float(), v.float()))
    close(out, wanted, case.tolerance * (2e-2 if dtype == torch.bfloat16 else 3e-3))


@masked_cases
def test_padding_has_no_influence(case: Case) -> None:
    operator, heads = case.build(SMALL), draw(SMALL)
    q, k, v = heads.qkv()
    heads.key_mask = torch.ones(2, SMALL.num_tokens, dtype=torch.bool)
    heads.key_mask[0, 7:] = False
    heads.key_mask[1, 12] = False
    before = operator(heads)
    hidden = ~heads.key_mask[:, None, :, None]
    changed = heads.with_qkv(q, k.masked_fill(hidden, 7.0), v.masked_fill(hidden, -9.0))
    torch.testing.assert_close(operator(changed), before, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(operator(heads.with_qkv(q, k, v + 1)), before)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.operator not in list(FOUND)[1:]], ids=str)
def test_compiles_in_one_graph(case: Case) -> None:
    torch.compiler.reset()  # else the cases before count against the limit of recompilations
    operator, heads = case.build(SMALL, torch.float32), draw(SMALL, torch.float32)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    close(compiled(heads), operator(heads), 1e-5)


@cases
def test_cost_is_linear_where_it_is_said_to_be(case: Case) -> None:
    small, large = Geometry(1, (16, 16)), Geometry(1, (72, 72))
    costs = [case.build(geometry).macs(geometry) / geometry.num_tokens for geometry in (small, large)]
    assert costs[0] > 0
    assert case.build(small).traits.linear_cost == (costs[1] < 4 * costs[0])
