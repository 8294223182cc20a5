"""The map-free operators against dense autograd."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention import kernels
from graftvit.models.attention.fused import apply_map, attention_with_lse, map_logsumexp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 3e-3}
SHAPES = [(1, 1, 1, 1, 8), (2, 3, 17, 17, 16), (1, 2, 5, 33, 8), (3, 1, 40, 7, 24)]


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-12))


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    batch, heads, rows, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, rows, width), (batch, heads, keys, width), (batch, heads, keys, width)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits = scale * q @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outputs", ["out", "lse", "both"])
def test_attention_with_lse(shape: tuple[int, int, int, int, int], dtype: torch.dtype, outputs: str) -> None:
    inputs = tensors(shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (out, lse), (out_ref, lse_ref) = attention_with_lse(*inputs, 0.3), dense(*exact, 0.3)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(out, out_ref) < TOLERANCE[dtype]
    assert relative(lse, lse_ref) < TOLERANCE[dtype]
    g_out, g_lse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    loss, loss_ref = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if outputs != "lse":
        loss, loss_ref = loss + (out * g_out).sum(), loss_ref + (out_ref * g_out).sum()
    if outputs != "out":
        loss, loss_ref = loss + (lse * g_lse).sum(), loss_ref + (lse_ref * g_lse).sum()
    loss.backward()
    loss_ref.backward()
    whole = [
        torch.cat([x.grad.double().flatten() for x in group[: 2 if outputs == "lse" else 3]])
        for group in (inputs, exact)
    ]
    assert relative(*whole) < 2 * TOLERANCE[dtype] or float(whole[1].norm()) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("values", [4, None, 40])
def test_apply_map(shape: tuple[int, int, int, int, int], dtype: torch.dtype, values: int | None) -> None:
    q, k, v = tensors(shape, dtype)
    if values is not None:
        v = torch.randn(*v.shape[:3], values).to(dtype).requires_grad_()
    exact = v.detach().double().requires_grad_()
    out, (reference, _) = apply_map(q, k, v, 0.3), dense(q.detach().double(), k.detach().double(), exact, 0.3)
    assert relative(out, reference) < TOLERANCE[dtype]
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    reference.backward(grad.double())
    assert relative(v.grad, exact.grad) < 2 * TOLERANCE[dtype]
    assert q.grad is None
    assert k.grad is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_map_logsumexp(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    q, k, _ = tensors(shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    lse, (_, reference) = map_logsumexp(q, k, 0.3), dense(exact[0], exact[1], exact[1], 0.3)
    assert relative(lse, reference) < TOLERANCE[dtype]
    grad = torch.randn(lse.shape)
    lse.backward(grad.to(lse.dtype))
    reference.backward(grad.double())
    assert relative(q.grad, exact[0].grad) < 2 * TOLERANCE[dtype]
    assert relative(k.grad, exact[1].grad) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("bias_shape", [(1, 3, 9, 9), (2, 3, 9, 9), (3, 9, 9), (1, 1, 9, 9)])
@pytest.mark.parametrize("learns", [False, True])
def test_bias(bias_shape: tuple[int, ...], learns: bool) -> None:
    shape = (2, 3, 9, 9, 8)
    bias = torch.randn(bias_shape, dtype=torch.float64, requires_grad=learns)
    inputs, exact = tensors(shape, torch.float64), tensors(shape, torch.float64)
    twin = bias.detach().clone().requires_grad_(learns)
    (out, lse), (out_ref, lse_ref) = attention_with_lse(*inputs, 0.3, bias), dense(*exact, 0.3, twin)
    (out.square().sum() + lse.square().sum()).backward()
    (out_ref.square().sum() + lse_ref.square().sum()).backward()
    for value, reference in zip([*inputs, bias][: 4 if learns else 3], [*exact, twin], strict=False):
        assert relative(value.grad, reference.grad) < 1e-12
    q, k, v = tensors(shape, torch.float64)
    apply_map(q, k, v, 0.3, bias).square().sum().backward()
    reference = tensors(shape, torch.float64)[2]
    dense(q.detach(), k.detach(), reference, 0.3, bias.detach())[0].square().sum().backward()
    assert relative(v.grad, reference.grad) < 1e-12
    values = map_logsumexp(q, k, 0.3, bias)
    assert relative(values, dense(q, k, k, 0.3, bias)[1]) < 1e-12


@pytest.mark.parametrize("operator", [attention_with_lse, apply_map])
def test_extreme_logits_stay_finite(operator: object) -> None:
    q, k, v = (x.detach().requires_grad_() for x in tensors((1, 2, 30, 30, 8), torch.float32))
    out = operator(q * 300, k * 300, v, 1.0)
    out = out[0] if isinstance(out, tuple) else out
    out.sum().backward()
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in (q, k, v))


LARGE = {torch.float32: 2e-2, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""What float32 leaves of a logit of 10,000 is wrong by a thousandth, and so is its exponential."""


@pytest.mark.parametrize("kernel", ["own", "other"])
@pytest.mark.parametrize("bias", ["none", "learned"])
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", LARGE)
def test_large_logits(
    dtype: torch.dtype, size: float, bias: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "other":
        monkeypatch.setattr(kernels, "_kernel", lambda q, bias: "other")
    q, k, v = (x.detach() for x in tensors((2, 3, 33, 29, 8), dtype))
    given = [q * (size / 3) ** 0.5, k * (size / 3) ** 0.5, v]
    if bias == "learned":
        generator = torch.Generator().manual_seed(1)
        given.append((size / 10 * torch.randn(1, 3, 33, 29, generator=generator)).to(dtype))
    inputs, exact = (
        [x.to(kind, copy=True).requires_grad_() for x in given] for kind in (dtype, torch.float64)
    )
    (q, k, v, *b), (Q, K, V, *B) = inputs, exact
    grad, grad_lse = torch.randn(2, 3, 33, 8).to(dtype), torch.randn(2, 3, 33)
    teacher = [x.detach() for x in b]
    teacher_exact = [x.detach() for x in B]
    for learned in ("map", "values", "rows"):
        for x in (*inputs, *exact):
            x.grad = None
        if learned == "map":
            out, lse = attention_with_lse(q, k, v, 0.5, *b)
            out_ref, lse_ref = dense(Q, K, V, 0.5, *B)
            assert relative(out, out_ref) < LARGE[dtype]
            ((out * grad).sum() + (lse * grad_lse).sum()).backward()
            ((out_ref * grad.double()).sum() + (lse_ref * grad_lse.double()).sum()).backward()
        elif learned == "values":
            apply_map(q, k, v, 0.5, *teacher).backward(grad)
            dense(Q.detach(), K.detach(), V, 0.5, *teacher_exact)[0].backward(grad.double())
        else:
            map_logsumexp(q, k, 0.5, *teacher).backward(grad_lse)
            dense(Q, K, K, 0.5, *teacher_exact)[1].backward(grad_lse.double())
        pairs = [(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True)]
        taught = [pair for pair in pairs if pair != (None, None)]
        assert len(taught) == {"map": len(given), "values": 1, "rows": 2}[learned]
        whole = [torch.cat([x.double().flatten() for x in side]) for side in zip(*taught, strict=True)]
        assert relative(*whole) < LARGE[dtype], learned
    if bias == "learned":
        found = kernels.mean_map(q.detach(), k.detach(), b[0].detach(), 0.5)
        wanted = dense(Q.detach(), K.detach(), torch.eye(29, dtype=torch.float64), 0.5, B[0].detach())[0]
        assert relative(found, wanted.mean(0)) < LARGE[dtype]


@given(st.integers(0, 99), st.sampled_from(list(LARGE)), st.floats(0, 4.5))
@settings(max_examples=30)
def test_large_logits_of_any_size_stay_finite(seed: int, dtype: torch.dtype, exponent: float) -> None:
    q, k, v = (x.detach() for x in tensors((1, 2, 17, 17, 8), dtype, seed))
    q, k = (x * 10 ** (exponent / 2) for x in (q, k))
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    lse = dense(q.double(), k.double(), v.double(), 1.0)[1].float()
    pulled = kernels.transposed_map(q, k, grad, lse, 1.0)
    wanted = (q.double() @ k.double().transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ grad.double()
    assert relative(pulled, wanted) < 5e-2


def test_layout_of_projections_as_timm_makes_them() -> None:
    qkv = torch.randn(2, 11, 3, 4, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    q, k, v = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in qkv.unbind(0))
    torch.library.opcheck(torch.ops.graftvit.attention_with_lse.default, (q, k, v, None, 0.3))
    torch.library.opcheck(torch.ops.graftvit.apply_map.default, (q.detach(), k.detach(), v, None, 0.3))
    torch.library.opcheck(torch.ops.graftvit.map_logsumexp.default, (q, k, None, 0.3))
    bias = torch.randn(1, 4, 11, 11, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.graftvit.attention_with_lse.default, (q, k, v, bias, 0.3))


def test_fallback_for_other_devices_equals_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, fallback = tensors((2, 2, 9, 9, 8), torch.float64), tensors((2, 2, 9, 9, 8), torch.float64)
    out, lse = attention_with_lse(*inputs, 0.3)
    (out.square().sum() + lse.square().sum()).backward()
    monkeypatch.setattr(kernels, "_kernel", lambda q, bias: "other")
    out, lse = attention_with_lse(*fallback, 0.3)
    (out.square().sum() + lse.square().sum()).backward()
    for a, b in zip(inputs, fallback, strict=True):
        assert relative(a.grad, b.grad) < 1e-12
    q, k, v = tensors((2, 2, 9, 9, 8), torch.float64)
    apply_map(q, k, v, 0.3).square().sum().backward()
    exact = tensors((2, 2, 9, 9, 8), torch.float64)
    dense(*exact, 0.3)[0].square().sum().backward()
    assert relative(v.grad, exact[2].grad) < 1e-12


@settings(max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_any_shape(batch: int, heads: int, rows: int, keys: int, width: int, seed: int) -> None:
    inputs = tensors((batch, heads, rows, keys, width), torch.float64, seed)
    exact = [x.detach().clone().requires_grad_() for x in inputs]
    (out, lse), (out_ref, lse_ref) = attention_with_lse(*inputs, 0.5), dense(*exact, 0.5)
    (out.sum() + lse.square().sum()).backward()
    (out_ref.sum() + lse_ref.square().sum()).backward()
    for value, reference in zip(inputs, exact, strict=True):
        assert torch.allclose(value.grad, reference.grad, atol=1e-11)
    q, k, v = (x.detach() for x in inputs)
    pulled = kernels.transposed_map(q, k, out_ref.detach(), lse.detach(), 0.5)
    expected = (0.5 * q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ out_ref.detach()
    assert torch.allclose(pulled, expected, atol=1e-11)
    assert v.shape == pulled.shape
