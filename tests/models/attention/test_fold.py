"""The gradient of the log-sum-exp, folded into the saved output, against dense float64."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention import kernels
from graftvit.models.attention.fold import fold_lse_gradient
from graftvit.models.attention.fused import attention_with_lse
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
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
        assert (value.double() - reference).norm() < TOLERANCE[qkv[0].dtype] * reference.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_gradients(dtype: torch.dtype) -> None:
    check(*draw(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_and_images_that_nothing_reads(dtype: torch.dtype) -> None:
    qkv, grad_out, grad_lse = draw(dtype)
    grad_out[1] = 0  # a dropped path
    grad_out[0, :, 1:] = 0  # the last layer of a model that reads its class token alone
    found, reference = gradients(qkv, grad_out, grad_lse), dense_gradients(qkv, grad_out, grad_lse)
    for value, exact in zip(found, reference, strict=True):
        for image in (0, 1, 2):
            error = (value[image].double() - exact[image]).norm()
            assert error < TOLERANCE[dtype] * exact[image].norm() or not exact[image].any()
    assert not reference[2][1].any()
    assert found[2][1].abs().max() < (1e-4 if dtype == torch.float16 else 1e-17)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_a_gradient_of_lse_nothing_changes(dtype: torch.dtype) -> None:
    _, grad_out, grad_lse = draw(dtype)
    out = torch.randn(SHAPE).to(dtype)
    grad_out[1] = 0
    given, folded = fold_lse_gradient(grad_out, torch.zeros_like(grad_lse), out)
    assert torch.equal(given, grad_out)
    assert torch.equal(folded, out)


@pytest.mark.parametrize("dtype", TOLERANCE)
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
@pytest.mark.parametrize("dtype", TOLERANCE)
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
def test_a_backward_pass_has_the_width_of_the_head(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
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
