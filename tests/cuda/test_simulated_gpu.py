"""Without a GPU: the kernels of CUDA simulated on a CPU, and operators and steps on fake tensors of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from graftvit.models.attention import fused, kernels
from graftvit.models.attention.base import Geometry, Heads
from graftvit.models.attention.fused import apply_map, attention_with_lse, map_logsumexp
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.method_facts import method_names
from support.models.dense import tiny
from support.models.device_cases import PRECISIONS, one_step, to_fake_gpu
from support.models.fake_cuda import SimulatedKernels, chooser
from support.models.operator_cases import CASES as STEPS_CASES
from support.models.operator_cases import HEADS, WIDTH, Case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CASES = [("efficient", dtype) for dtype in TOLERANCE]
CASES += [("flash", dtype) for dtype in TOLERANCE if dtype != torch.float32]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> SimulatedKernels:
    found = SimulatedKernels()
    monkeypatch.setattr(kernels, "aten", found)
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
    aligned = kernels.align_bias(bias, 2)
    assert torch.equal(aligned, bias.expand(2, -1, -1, -1))
    assert all(stride % 16 == 0 for stride in aligned.stride()[:-1])


def test_the_kernel_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def choices(ampere: bool) -> list[str | None]:
        monkeypatch.setattr(kernels, "is_ampere", lambda index: ampere)
        found = [
            kernels.choose(torch.empty(1, 1, 4, 64, dtype=dtype), bias)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            for bias in (None, torch.empty(0))
        ]
        return [*found, kernels.choose(torch.empty(1, 1, 4, 264), None)]

    new = ["flash", "efficient", "flash", "efficient", "efficient", "efficient", None, None, None]
    old = ["efficient", "efficient", None, None, "efficient", "efficient", None, None, None]
    assert (choices(True), choices(False)) == (new, old)


# The operators on fake tensors of a GPU: what tracing promises is what the kernels of CUDA return.


TENSORS = [(torch.float32, "heads"), (torch.bfloat16, "timm")]
TENSORS += [
    pytest.param(*each, marks=pytest.mark.slow)
    for each in ((torch.float16, "heads"), (torch.float64, "timm"))
]
SHAPES = [(2, 3, 17, 17, 16), (1, 2, 33, 5, 64), (2, 2, 9, 9, 20), (2, 1, 1, 1, 8), (1, 2, 10, 10, 264)]


def fake_draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    batch, heads, rows, keys, width = shape

    def one(tokens: int) -> Tensor:
        if layout == "timm":
            qkv = torch.empty(batch, tokens, 3, heads, width, device="cuda", dtype=dtype)
            return qkv.permute(2, 0, 3, 1, 4)[0]
        return torch.empty(batch, heads, tokens, width, device="cuda", dtype=dtype)

    return [one(rows), one(keys), one(keys)]


def signatures(outputs: Tensor | Sequence[Tensor]) -> list[tuple[object, ...]]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [(x.shape, x.stride(), x.dtype, x.device) for x in outputs]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "layout"), TENSORS)
@pytest.mark.parametrize("images", [0, 1, -1], ids=["no bias", "shared bias", "bias by image"])
def test_shapes_types_and_layouts(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, images: int
) -> None:
    with FakeTensorMode():
        q, k, v = fake_draw(shape, dtype, layout)
        batch, heads, rows, keys, _ = shape
        size = (batch if images < 0 else 1, heads, rows, keys)
        bias = torch.empty(size, device="cuda", dtype=dtype) if images else None
        out, lse = fused._attention_with_lse(q, k, v, bias, 0.3)
        grad_out, grad_lse = torch.empty_like(out), torch.empty_like(lse)
        saved = q, k, v, bias, out, lse, 0.3
        calls = [
            (fused._attention_with_lse, (q, k, v, bias, 0.3)),
            (fused._apply_map, (q, k, v, bias, 0.3)),
            (fused._map_logsumexp, (q, k, bias, 0.3)),
            (fused._attention_with_lse_backward, (grad_out, grad_lse, *saved, False)),
            (fused._attention_with_lse_backward, (grad_out, grad_lse, *saved, True)),
            (fused._apply_map_backward, (grad_out, *saved)),
            (fused._map_logsumexp_backward, (grad_lse, q, k, bias, lse, out, 0.3)),
        ]
        for operator, arguments in calls:
            if operator is fused._attention_with_lse_backward and arguments[-1] and bias is None:
                continue
            assert signatures(operator._init_fn(*arguments)) == signatures(operator(*arguments))


def test_which_kernel_a_gpu_uses() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 7, 20, device="cuda", dtype=torch.bfloat16)
        assert kernels._kernel(q, None) == "flash"
        assert kernels._kernel(q, q) == "efficient"
        assert kernels._kernel(q.float(), None) == "efficient"
        assert kernels._kernel(q.double(), None) == "other"


# Steps on fake tensors of a GPU: every operator and method, without a wait for the GPU or a tensor on the CPU.


METHODS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in method_names()]
METHODS += [
    ("distill", {"rows": 0.5}), ("distill", {"temperature": 2.0}), ("distill", {"loss": "kl"}),
    ("distill", {"heads": [1]}), ("copy", {"heads": [1]}), ("copy", {"layers": [0]}),
]  # fmt: skip
FAMILIES = ["vit_no_prefix", "deit_distilled", "dinov2_registers", "qk_norm", "beit", "beit_shared", "eva02"]
STEPS = [("vit", *method) for method in METHODS]
STEPS += [(family, method, {}) for family in FAMILIES for method in ("copy", "distill")]


def in_precisions(cases: Sequence[object]) -> list[object]:
    """Each case in bf16, and in one of the other precisions in turn, which is slow."""
    others = cycle(name for name in PRECISIONS if name != "bf16")
    slow = [
        pytest.param(*pair, marks=pytest.mark.slow, id=f"{pair[0]}-{pair[1]}")
        for pair in zip(cases, others, strict=False)
    ]
    return [*(pytest.param(case, "bf16", id=f"{case}-bf16") for case in cases), *slow]


@pytest.mark.parametrize(("step", "precision"), in_precisions(STEPS))
def test_method(step: tuple[str, str, dict[str, Any]], precision: str) -> None:
    family, method, options = step
    teacher, student = (tiny(family, seed, torch.float32, depth=2) for seed in range(2))
    dual = DualViT(teacher, student, method, **options).train()
    with FakeTensorMode():
        for model in (dual, teacher):
            to_fake_gpu(model)
        images = torch.empty(2, 3, 32, 48, device="cuda")
        with one_step(precision):
            out = dual(images)
        assert out.logits.device.type == out.transfer_loss.device.type == "cuda"
        assert out.transfer_loss.dtype == torch.float32


@pytest.mark.parametrize(("case", "precision"), in_precisions(STEPS_CASES))
def test_operator(case: Case, precision: str) -> None:
    geometry = Geometry(1, (7, 9))
    operator = case.build(geometry, torch.float32).train()
    with FakeTensorMode():
        to_fake_gpu(operator)
        size, dtype = (2, HEADS, geometry.num_tokens, WIDTH), PRECISIONS[precision] or torch.float32
        q, k, v = (torch.empty(size, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        with one_step(precision):
            out = operator(Heads(q, k, v, None, 0.3, geometry=geometry))
        assert out.device.type == "cuda"
        assert out.shape == v.shape
