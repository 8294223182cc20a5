"""The operators on the kernels of a GPU, simulated on a CPU, against dense float64."""

from __future__ import annotations

import pytest
import torch
from graftvit.models.attention import cuda_kernels, kernels
from graftvit.models.attention.fused import apply_map, attention_with_lse, map_logsumexp
from support.models.fake_cuda import SimulatedKernels, chooser
from torch import Tensor

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CASES = [("efficient", dtype) for dtype in TOLERANCE]
CASES += [("flash", dtype) for dtype in TOLERANCE if dtype != torch.float32]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> SimulatedKernels:
    found = SimulatedKernels()
    monkeypatch.setattr(cuda_kernels, "aten", found)
    monkeypatch.setattr(kernels, "_kernel", chooser(request.param))
    return found


def check(inputs: list[Tensor], outputs: list[Tensor], exact: list[Tensor], reference: list[Tensor]) -> None:
    """Compare outputs, and gradients for random upstream gradients; all gradients as one vector."""
    dtype = inputs[0].dtype
    upstream = [torch.randn(x.shape).to(x.dtype) for x in outputs]
    found = torch.autograd.grad(outputs, inputs, upstream)
    wanted = torch.autograd.grad(reference, exact, [x.double() for x in upstream])
    for value, target in zip((*outputs, *found), (*reference, *wanted), strict=True):
        assert value.shape == target.shape
        assert (value.double() - target).norm() < 2 * TOLERANCE[dtype] * target.norm()


def draw(
    dtype: torch.dtype, width: int, bias: str, rows: int = 33
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    torch.manual_seed(0)
    sizes = [(2, 3, rows, width), (2, 3, 21, width), (2, 3, 21, width)]
    inputs = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    shape = {"none": None, "shared": (1, 3, rows, 21), "one": (2, 1, rows, 21), "image": (2, 3, rows, 21)}[
        bias
    ]
    extra = None if shape is None else torch.randn(shape).to(dtype)
    return inputs, [x.detach().double().requires_grad_() for x in inputs], extra


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> list[Tensor]:
    logits = 0.3 * q @ k.transpose(-2, -1) + (0 if bias is None else bias.double())
    return [logits.softmax(-1) @ v, logits.logsumexp(-1)]


@pytest.mark.parametrize(("simulated", "dtype"), CASES, indirect=["simulated"])
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("bias", ["none", "shared", "one", "image"])
def test_attention_with_lse(simulated: SimulatedKernels, dtype: torch.dtype, width: int, bias: str) -> None:
    inputs, exact, extra = draw(dtype, width, bias)
    check(inputs, list(attention_with_lse(*inputs, 0.3, extra)), exact, dense(*exact, extra))
    assert len(simulated.calls) == 2


@pytest.mark.parametrize(("simulated", "dtype"), CASES, indirect=["simulated"])
@pytest.mark.parametrize("values", [4, 16, 33])
@pytest.mark.parametrize("bias", ["none", "image"])
def test_apply_map(simulated: SimulatedKernels, dtype: torch.dtype, values: int, bias: str) -> None:
    (q, k, _), (q64, k64, _), extra = draw(dtype, 16, bias)
    v = torch.randn(2, 3, 21, values).to(dtype).requires_grad_()
    exact = v.detach().double().requires_grad_()
    out = apply_map(q, k, v, 0.3, extra)
    check([v], [out], [exact], dense(q64.detach(), k64.detach(), exact, extra)[:1])
    assert len(simulated.calls) == 2


@pytest.mark.parametrize(("simulated", "dtype"), CASES, indirect=["simulated"])
@pytest.mark.parametrize("bias", ["none", "image"])
def test_map_logsumexp(simulated: SimulatedKernels, dtype: torch.dtype, bias: str) -> None:
    (q, k, _), (q64, k64, v64), extra = draw(dtype, 16, bias)
    lse = map_logsumexp(q, k, 0.3, extra)
    check([q, k], [lse], [q64, k64], dense(q64, k64, v64, extra)[1:])
    assert len(simulated.calls) == 2


@pytest.mark.parametrize(("simulated", "dtype"), CASES, indirect=["simulated"])
def test_inputs_of_any_layout(simulated: SimulatedKernels, dtype: torch.dtype) -> None:
    inputs, exact, _ = draw(dtype, 16, "none", rows=21)
    turned = [x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in inputs]
    out, lse = attention_with_lse(*turned, 0.3)
    (out.sum() + lse.sum()).backward()  # an expanded upstream gradient
    reference = dense(*exact, None)
    (reference[0].sum() + reference[1].sum()).backward()
    for value, target in zip(inputs, exact, strict=True):
        assert (value.grad.double() - target.grad).norm() < 4 * TOLERANCE[dtype] * target.grad.norm()
    apply_map(*turned, 0.3).sum().backward()
    assert simulated.calls


@pytest.mark.parametrize("keys", [16, 21, 33])
@pytest.mark.parametrize("images", [1, 2])
def test_an_aligned_bias_is_the_same_bias(keys: int, images: int) -> None:
    bias = torch.randn(images, 3, 5, keys)
    aligned = cuda_kernels.align_bias(bias, 2)
    assert torch.equal(aligned, bias.expand(2, -1, -1, -1))
    assert all(stride % 16 == 0 for stride in aligned.stride()[:-1])


def test_the_kernel_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def choices(ampere: bool) -> list[str | None]:
        monkeypatch.setattr(cuda_kernels, "is_ampere", lambda index: ampere)
        found = [
            cuda_kernels.choose(torch.empty(1, 1, 4, 64, dtype=dtype), bias)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            for bias in (None, torch.empty(0))
        ]
        return [*found, cuda_kernels.choose(torch.empty(1, 1, 4, 264), None)]

    new = ["flash", "efficient", "flash", "efficient", "efficient", "efficient", None, None, None]
    old = ["efficient", "efficient", None, None, "efficient", "efficient", None, None, None]
    assert (choices(True), choices(False)) == (new, old)
