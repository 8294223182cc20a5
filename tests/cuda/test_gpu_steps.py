"""Steps on a real GPU: every method in every precision against float64, compiled, and without a wait."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from graftvit.transfer.methods.dual import DualViT
from graftvit.transfer.methods.method_facts import method_names
from support.models.dense import gradient, images, relative_error, tiny
from torch import Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"
PRECISIONS: dict[str, tuple[torch.dtype | None, float]] = {
    "fp32": (None, 1e-3),
    "tf32": (None, 2e-2),
    "bf16": (torch.bfloat16, 8e-2),
    "fp16": (torch.float16, 2e-2),
}
"""The type of autocast, and how far gradients may be from those of float64."""
METHODS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in method_names()]
METHODS += [("distill", {"heads": [1]}), ("copy", {"heads": [1]}), ("distill", {"temperature": 2.0})]


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Round the inputs of float32 products in tests of TF32 alone."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = "tf32" in request.node.name
    yield
    for kind, value in zip(kinds, before, strict=True):
        kind.allow_tf32 = value


def loss_of(dual: DualViT, x: Tensor) -> Tensor:
    out = dual(x)
    return out.logits.float().square().mean() + out.transfer_loss


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["vit", "beit", "eva02"])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_gradients(method: str, options: dict[str, Any], family: str, precision: str) -> None:
    dtype, tolerance = PRECISIONS[precision]
    exact = DualViT(tiny(family, 0), tiny(family, 1), method, **options)
    loss = exact(images())
    (loss.logits.square().mean() + loss.transfer_loss).backward()
    teacher, student = (tiny(family, seed, torch.float32).to(DEVICE) for seed in (0, 1))
    dual = DualViT(teacher, student, method, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=precision == "fp16")
    with nullcontext() if dtype is None else torch.autocast(DEVICE, dtype):
        scaled = scaler.scale(loss_of(dual, images(dtype=torch.float32).to(DEVICE)))
    scaled.backward()
    found = gradient(student).cpu() / (scaler.get_scale() if scaler.is_enabled() else 1)
    assert relative_error(found, gradient(exact.student)) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_no_step_waits_for_the_gpu(method: str, options: dict[str, Any], precision: str) -> None:
    dtype, _ = PRECISIONS[precision]
    teacher, student = (tiny("vit", seed, torch.float32).to(DEVICE) for seed in (0, 1))
    dual = DualViT(teacher, student, method, **options).train()
    x = images(dtype=torch.float32).to(DEVICE)

    def step() -> None:
        with nullcontext() if dtype is None else torch.autocast(DEVICE, dtype):
            loss = loss_of(dual, x)
        loss.backward()

    step()  # torch and its libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["vit", "beit"])
@pytest.mark.parametrize("method", ["copy", "distill"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled(method: str, family: str, dtype: torch.dtype | None) -> None:
    x, losses = images(dtype=torch.float32).to(DEVICE), []
    teacher, student = (tiny(family, seed, torch.float32).to(DEVICE) for seed in (0, 1))
    gradients = []
    for compiles in (False, True):
        dual = DualViT(copy.deepcopy(teacher), copy.deepcopy(student), method)
        if compiles:
            dual.compile()
        with nullcontext() if dtype is None else torch.autocast(DEVICE, dtype):
            losses.append(loss_of(dual, x))
        losses[-1].backward()
        gradients.append(gradient(dual.student))
    assert relative_error(gradients[1], gradients[0]) < (1e-3 if dtype is None else 8e-2)
