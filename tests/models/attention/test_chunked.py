"""Kernel attention in chunks of tokens against its whole map."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graftvit.models.attention import chunked
from graftvit.models.attention.base import Geometry
from support.models.operator_cases import HEADS, WIDTH, Case, draw

GEOMETRY = Geometry(2, (4, 6))
CHUNKED = [
    Case("linear"),
    Case("performer"),
    Case("cosformer"),
    Case("kernel", {"feature": "relu"}),
    Case("kernel", {"feature": "favor", "num_features": 11, "local": "v"}),
    Case("kernel", {"feature": "cosine"}),
]
cases = pytest.mark.parametrize("case", CHUNKED, ids=str)


def cut(monkeypatch: pytest.MonkeyPatch, tokens: int, width: int) -> list[Any]:
    """Make chunks of `tokens` tokens; the list gets every forward pass in chunks."""
    calls: list[Any] = []
    apply = chunked._ChunkedAttention.apply
    monkeypatch.setitem(chunked.CACHED, "cpu", tokens * HEADS * width)
    monkeypatch.setattr(
        chunked._ChunkedAttention, "apply", lambda *inputs: calls.append(inputs) or apply(*inputs)
    )
    return calls


@cases
@pytest.mark.parametrize(
    "tokens",
    [1, 7, 2 * GEOMETRY.num_tokens, 3 * GEOMETRY.num_tokens],
    ids=["one", "several", "two images", "all images"],
)
def test_chunks_give_the_map_and_its_gradients(
    case: Case, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator: Any = case.build(GEOMETRY)
    heads = draw(GEOMETRY, batch=3, size=2)
    _, _, v = inputs = [x.requires_grad_() for x in heads.qkv()]
    calls = cut(monkeypatch, tokens, operator.feature.num_features(GEOMETRY))
    upstream = torch.randn_like(v)
    out = operator.attend(heads)
    wanted = operator.matrix(heads) @ v
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    first, found = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for _ in range(2))
    for gradient, dense in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-7, atol=1e-9)
    assert all(map(torch.equal, first, found)), "the backward pass changed what it read"
    assert len(calls) == 1


def test_a_copied_operator_runs_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = draw(GEOMETRY)
    heads.values().requires_grad_()
    calls = cut(monkeypatch, 5, WIDTH)
    copy.deepcopy(Case("linear").build(GEOMETRY))(heads)
    assert len(calls) == 1


def test_no_query_divides_by_zero_where_all_its_features_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 5, WIDTH)
    operator, heads = Case("kernel", {"feature": "relu"}).build(GEOMETRY), draw(GEOMETRY)
    q, k, v = heads.qkv()
    inputs = [-q.abs().requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out = operator(heads.with_qkv(inputs[0], inputs[1], inputs[2]))
    assert not out.any()
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("name", ["performer", "cosformer"])
def test_half_precision_keeps_float32_sums(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 5, WIDTH)
    operator, heads = Case(name).build(GEOMETRY, torch.float32), draw(GEOMETRY, torch.bfloat16)
    inputs = [x.requires_grad_() for x in heads.qkv()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator(heads)
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    wanted_inputs = [x.detach().float().requires_grad_() for x in inputs]
    wanted = operator(heads.with_qkv(wanted_inputs[0], wanted_inputs[1], wanted_inputs[2]))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-3)
    for found, dense in zip(
        gradients, torch.autograd.grad(wanted, wanted_inputs, torch.ones_like(wanted)), strict=True
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), dense, rtol=2e-2, atol=2e-2)


def test_features_that_need_no_gradient_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass keeps q, k, v, the output and the sums: nothing as large as the features."""
    cut(monkeypatch, 50, 2 * WIDTH)
    geometry = Geometry(0, (32, 32))
    operator, heads = Case("performer").build(geometry), draw(geometry, batch=1)
    kept: list[int] = []
    for x in heads.qkv():
        x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        operator.attend(heads)
    assert max(kept) == heads.values().numel()
