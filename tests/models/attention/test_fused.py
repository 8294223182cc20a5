"""Attention without a map, and the gradient of its log-sum-exp, against dense autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftvit.models.attention import kernels
from graftvit.models.attention.fused import apply_map, attention_with_lse, map_logsumexp
from graftvit.models.attention.kernels import fold_lse_gradient
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
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logits = scale * q @ k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


ATTENTION: dict[str, tuple[Callable[..., Any], str, slice]] = {
    "out": (lambda *x: attention_with_lse(*x)[0], "qkvb", slice(1)),
    "lse": (lambda *x: attention_with_lse(*x)[1], "qkb", slice(1, 2)),
    "both": (attention_with_lse, "qkvb", slice(2)),
    "map": (apply_map, "v", slice(1)),
    "rows": (lambda q, k, v, *more: map_logsumexp(q, k, *more), "qk", slice(1, 2)),
}
"""By name: what is called, which of q, k, v and the bias get a gradient, and which of the dense outputs it gives."""


def check_fused(name: str, given: list[Tensor], scale: float, tolerance: float, slack: float = 2) -> None:
    """Compare outputs, and gradients as one vector, with the dense form in float64; `given` is q, k, v and a bias."""
    call, learned, which = ATTENTION[name]
    inputs, exact = ([x.to(kind, copy=True) for x in given] for kind in (given[0].dtype, torch.float64))
    for part, *pair in zip("qkvb", inputs, exact, strict=False):
        for x in pair:
            x.requires_grad_(part in "qkv" + learned)
    (q, k, v, *bias), (q64, k64, v64, *bias64) = inputs, exact
    outs, wanted = call(q, k, v, scale, *bias), dense(q64, k64, v64, scale, *bias64)[which]
    outs = outs if isinstance(outs, tuple) else (outs,)
    upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
    for out, reference in zip(outs, wanted, strict=True):
        assert out.dtype == (q.dtype if out.ndim == 4 else torch.promote_types(q.dtype, torch.float32))
        assert relative(out, reference) < tolerance
    found, target = (
        torch.autograd.grad(of, [x for x in to if x.requires_grad], above, allow_unused=True)
        for of, to, above in ((outs, inputs, upstream), (wanted, exact, [x.double() for x in upstream]))
    )
    pairs = []
    for part, gradient, reference in zip("qkvb", found, target, strict=False):
        if part in learned:
            pairs.append((gradient.double().flatten(), reference.flatten()))
        else:
            assert gradient is None or name == "lse"  # which has one of nearly zero
    whole = [torch.cat(side) for side in zip(*pairs, strict=True)]
    assert relative(*whole) < slack * tolerance or float(whole[1].norm()) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ATTENTION)
def test_fused_attention_is_the_dense_one(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    check_fused(name, tensors(shape, dtype), 0.3, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [4, 40])
def test_other_widths_of_values(
    width: int, dtype: torch.dtype, shape: tuple[int, int, int, int, int]
) -> None:
    q, k, v = tensors(shape, dtype)
    check_fused("map", [q, k, torch.randn(*v.shape[:3], width).to(dtype)], 0.3, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 3, 9, 9), (2, 3, 9, 9), (3, 9, 9), (1, 1, 9, 9)])
@pytest.mark.parametrize("name", ATTENTION)
def test_bias(name: str, shape: tuple[int, ...]) -> None:
    given = tensors((2, 3, 9, 9, 8), torch.float64)
    check_fused(name, [*given, torch.randn(shape, dtype=torch.float64)], 0.3, 1e-12, slack=1)


def test_a_bias_that_does_not_learn() -> None:
    given = tensors((2, 3, 9, 9, 8), torch.float64)
    bias = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in given)
    found = torch.autograd.grad(attention_with_lse(q, k, v, 0.3, bias)[0].square().sum(), [q, k, v])
    wanted = torch.autograd.grad(dense(q, k, v, 0.3, bias)[0].square().sum(), [q, k, v])
    assert all(relative(x, y) < 1e-12 for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("operator", [attention_with_lse, apply_map])
def test_extreme_logits_stay_finite(operator: object) -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 30, 30, 8), torch.float32))
    out = operator(q * 300, k * 300, v, 1.0)
    out = out[0] if isinstance(out, tuple) else out
    out.sum().backward()
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in (q, k, v))


LARGE = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kernel", ["own", "other"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("name", ["both", "map", "rows"])
def test_large_logits(
    name: str, dtype: torch.dtype, size: float, bias: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What float32 leaves of a logit of 10,000 is wrong by a thousandth, and so is its exponential."""
    if kernel == "other":
        monkeypatch.setattr(kernels, "_kernel", lambda q, bias: "other")
    q, k, v = tensors((2, 3, 33, 29, 8), dtype)
    given = [q * (size / 3) ** 0.5, k * (size / 3) ** 0.5, v]
    if bias:
        generator = torch.Generator().manual_seed(1)
        given.append((size / 10 * torch.randn(1, 3, 33, 29, generator=generator)).to(dtype))
    check_fused(name, given, 0.5, 2e-2, slack=1)
    if bias:
        q, k, _, b = given
        found = kernels.mean_map(q, k, b, 0.5)
        wanted = dense(q.double(), k.double(), torch.eye(29, dtype=torch.float64), 0.5, b.double())[0]
        assert relative(found, wanted.mean(0)) < 2e-2


@given(st.integers(0, 99), st.sampled_from(LARGE), st.floats(0, 4.5))
@settings(max_examples=30)
def test_large_logits_of_any_size_stay_finite(seed: int, dtype: torch.dtype, exponent: float) -> None:
    q, k, v = tensors((1, 2, 17, 17, 8), dtype, seed)
    q, k = (x * 10 ** (exponent / 2) for x in (q, k))
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    lse = dense(q.double(), k.double(), v.double(), 1.0)[1].float()
    pulled = kernels.transposed_map(q, k, grad, lse, 1.0)
    wanted = (q.double() @ k.double().transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ grad.double()
    assert relative(pulled, wanted) < 5e-2


@pytest.mark.parametrize("name", ATTENTION)
def test_channels_that_are_apart_in_memory(name: str) -> None:
    given = [x.mT.contiguous().mT for x in tensors((2, 3, 17, 17, 16), torch.float64)]
    check_fused(name, given, 0.3, TOLERANCE[torch.float64])


def test_layout_of_projections_as_timm_makes_them() -> None:
    qkv = torch.randn(2, 11, 3, 4, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    q, k, v = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in qkv.unbind(0))
    bias = torch.randn(1, 4, 11, 11, dtype=torch.float64, requires_grad=True)
    operators = torch.ops.graftvit
    torch.library.opcheck(operators.attention_with_lse.default, (q, k, v, None, 0.3))
    torch.library.opcheck(operators.apply_map.default, (q.detach(), k.detach(), v, None, 0.3))
    torch.library.opcheck(operators.map_logsumexp.default, (q, k, None, 0.3))
    torch.library.opcheck(operators.attention_with_lse.default, (q, k, v, bias, 0.3))


@pytest.mark.parametrize("name", ATTENTION)
def test_fallback_for_other_devices_is_the_dense_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kernel", lambda q, bias: "other")
    check_fused(name, tensors((2, 2, 9, 9, 8), torch.float64), 0.3, 1e-12, slack=1)


@settings(max_examples=30)
@given(*(st.integers(1, most) for most in (3, 3, 40, 40, 20)), st.integers(0, 99))
def test_any_shape(batch: int, heads: int, rows: int, keys: int, width: int, seed: int) -> None:
    inputs = tensors((batch, heads, rows, keys, width), torch.float64, seed)
    check_fused("both", inputs, 0.5, 1e-11)
    q, k, v = inputs
    out, lse = dense(q, k, v, 0.5)
    pulled = kernels.transposed_map(q, k, out, lse, 0.5)
    expected = (0.5 * q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ out
    assert torch.allclose(pulled, expected, atol=1e-11)
    assert v.shape == pulled.shape


# The gradient of the log-sum-exp, folded into the saved output, against dense float64.


FOLD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
ROUNDOFF = {
    torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11,
}  # fmt: skip
SHAPE = (3, 2, 19, 16)


def draw(
    dtype: torch.dtype, shape: tuple[int, ...] = SHAPE, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return q, k and v, an upstream gradient of the output, and one of the log-sum-exp."""
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    grad_lse = torch.randn(shape[:3], generator=generator).to(torch.promote_types(dtype, torch.float32))
    return qkv, torch.randn(shape, generator=generator).to(dtype), grad_lse


def gradients(qkv: list[Tensor], grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in qkv]
    out, lse = attention_with_lse(*inputs, 0.3)
    return list(torch.autograd.grad([out, lse], inputs, [grad_out, grad_lse]))


def dense_gradients(qkv: list[Tensor], grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
    q, k, v = (x.double().requires_grad_() for x in qkv)
    logits = 0.3 * q @ k.transpose(-2, -1)
    outputs = [logits.softmax(-1) @ v, logits.logsumexp(-1)]
    return list(torch.autograd.grad(outputs, [q, k, v], [grad_out.double(), grad_lse.double()]))


def check(qkv: list[Tensor], grad_out: Tensor, grad_lse: Tensor) -> None:
    """Compare each gradient, relative to the norm of the reference."""
    found = gradients(qkv, grad_out, grad_lse)
    for value, reference in zip(found, dense_gradients(qkv, grad_out, grad_lse), strict=True):
        assert (value.double() - reference).norm() < FOLD_TOLERANCE[qkv[0].dtype] * reference.norm()


@pytest.mark.parametrize("dtype", FOLD_TOLERANCE)
def test_both_gradients(dtype: torch.dtype) -> None:
    check(*draw(dtype))


@pytest.mark.parametrize("dtype", FOLD_TOLERANCE)
def test_rows_and_images_that_nothing_reads(dtype: torch.dtype) -> None:
    qkv, grad_out, grad_lse = draw(dtype)
    grad_out[1] = 0  # a dropped path
    grad_out[0, :, 1:] = 0  # the last layer of a model that reads its class token alone
    found, reference = gradients(qkv, grad_out, grad_lse), dense_gradients(qkv, grad_out, grad_lse)
    for value, exact in zip(found, reference, strict=True):
        for image in (0, 1, 2):
            error = (value[image].double() - exact[image]).norm()
            assert error < FOLD_TOLERANCE[dtype] * exact[image].norm() or not exact[image].any()
    assert not reference[2][1].any()
    assert found[2][1].abs().max() < (1e-4 if dtype == torch.float16 else 1e-17)


@pytest.mark.parametrize("dtype", FOLD_TOLERANCE)
def test_without_a_gradient_of_lse_nothing_changes(dtype: torch.dtype) -> None:
    _, grad_out, grad_lse = draw(dtype)
    out = torch.randn(SHAPE).to(dtype)
    grad_out[1] = 0
    given, folded = fold_lse_gradient(grad_out, torch.zeros_like(grad_lse), out)
    assert torch.equal(given, grad_out)
    assert torch.equal(folded, out)


@pytest.mark.parametrize("dtype", FOLD_TOLERANCE)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1e2, 1e4])
def test_small_and_large_gradients_of_lse(dtype: torch.dtype, size: float) -> None:
    qkv, grad_out, grad_lse = draw(dtype)
    share = 1e-2 if dtype == torch.float16 else 1  # of what float16 holds: dS and dq grow with g
    check(qkv, grad_out, share * size * grad_lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1e-15])
def test_the_scale_of_the_loss_does_not_matter(dtype: torch.dtype, size: float) -> None:
    qkv, grad_out, grad_lse = draw(dtype)
    check(qkv, size * grad_out, grad_lse)
    check(qkv, size * grad_out, size * grad_lse)


def test_a_loss_scale_beyond_float16() -> None:
    qkv, grad_out, grad_lse = draw(torch.float16)
    grad_out[1] = 0
    given, folded = fold_lse_gradient(grad_out, 1e6 * grad_lse, qkv[2])
    assert bool(given.isfinite().all())
    assert bool(folded.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["out", "lse"])
@pytest.mark.parametrize("dtype", FOLD_TOLERANCE)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, where: str, bad: float) -> None:
    qkv, grad_out, grad_lse = draw(dtype)
    (grad_out[0, 0, 0] if where == "out" else grad_lse[0, 0])[0] = bad
    assert not bool(gradients(qkv, grad_out, grad_lse)[0][0, 0, 0].isfinite().all())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
    st.integers(1, 65),
    st.floats(-12, 4),
    st.floats(-12, 4),
    st.booleans(),
)
def test_the_stated_bound(
    dtype: torch.dtype, seed: int, width: int, out_size: float, lse_size: float, zeros: bool
) -> None:
    qkv, grad_out, grad_lse = draw(dtype, (1, 2, 9, width), seed)
    grad_out, grad_lse, out = grad_out * 10**out_size, grad_lse * 10**lse_size, qkv[0]
    if zeros:
        grad_out[:, :, ::2] = 0
    given, folded = fold_lse_gradient(grad_out, grad_lse, out)
    ratio, least = (2**-14, 2**-24) if dtype == torch.float16 else (2**-60, 2**-60)
    exact, old, new, g = given.double(), out.double(), folded.double(), grad_lse.double()
    size = 2 * (width * least + ratio * g.abs()) * 1.01
    assert bool(((exact - grad_out.double()).norm(dim=-1) <= size).all())
    rounding = ROUNDOFF[dtype], torch.finfo(grad_lse.dtype).eps / 2
    bound = rounding[0] * ((exact * old).abs().sum(-1) + g.abs()) + (width + 4) * rounding[1] * g.abs()
    subnormal = (
        2.0**-25 * exact.abs().sum(-1) if dtype == torch.float16 else 0
    )  # below which float16 rounds to
    assert bool(
        (((exact * new).sum(-1) - ((exact * old).sum(-1) - g)).abs() <= 1.01 * bound + subnormal).all()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_backward_pass_has_the_heads_width(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, original = [], kernels.backward

    def record(grad_out: Tensor, *rest: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        widths.append(tuple(x.shape[-1] for x in (grad_out, *rest[:3])))
        return original(grad_out, *rest, **options)

    monkeypatch.setattr(kernels, "backward", record)
    gradients(*draw(dtype))
    assert widths == [(16, 16, 16, 16)]


def test_layouts_are_kept() -> None:
    _, grad_out, grad_lse = draw(torch.float32)
    by_token = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (grad_out, by_token):
        for x in fold_lse_gradient(layout, grad_lse, layout):
            assert x.stride() == layout.stride()
