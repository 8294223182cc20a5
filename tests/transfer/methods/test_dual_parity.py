"""Loss, logits and gradients of every method against the dense reference, for every family."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import FAMILIES, Layer, cross_entropy, gradient, images, relative_error, run, tiny
from torch import Tensor, nn

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
METHODS = [
    "copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v",
    "attention_output", "block_output", "feature", "logits",
]  # fmt: skip


CORE = ("vit", "beit", "eva02")
"""Families with no bias of positions, a bias and a rotation: every method is compared there without `slow`."""
PAIRS = [
    pytest.param(
        method, family, marks=[] if family in CORE or method in ("copy", "distill") else pytest.mark.slow
    )
    for method in METHODS
    for family in FAMILIES
]


def block_outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _, __, out: outputs.append(out)) for b in model.blocks]
    model(x)
    for handle in handles:
        handle.remove()
    return outputs


def copying(teacher: list[Layer], part: str) -> Callable[[int, Layer], Tensor]:
    def override(index: int, own: Layer) -> Tensor:
        t = teacher[index]
        if part == "map":
            return t.map @ own.v
        # A relative position bias is the student's own unless the whole map is copied.
        bias = own.logits - own.q @ own.k.transpose(-2, -1) * own.q.shape[-1] ** -0.5
        q, k, v = (getattr(t if name == part else own, name) for name in "qkv")
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v

    return override


def reference(method: str, teacher: nn.Module, student: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and summed transfer loss of equally shaped models, dense."""
    with torch.no_grad():
        target, t = run(teacher, x)
        blocks = block_outputs(teacher, x)
        feature = teacher.forward_head(teacher.forward_features(x), pre_logits=True)
    if method.startswith("copy"):
        logits, _ = run(student, x, copying(t, method.removeprefix("copy").strip("_") or "map"))
        return logits, logits.new_zeros(())
    logits, s = run(student, x)
    if method == "distill":
        return logits, sum(cross_entropy(a.map, b.logits) for a, b in zip(t, s, strict=True))
    if method.startswith("distill"):
        part = method[-1]
        return logits, sum(F.mse_loss(getattr(b, part), getattr(a, part)) for a, b in zip(t, s, strict=True))
    if method == "attention_output":
        return logits, sum(F.mse_loss(b.out, a.out) for a, b in zip(t, s, strict=True))
    if method == "block_output":
        own = block_outputs(student, x)
        return logits, sum(F.mse_loss(b, a) for a, b in zip(blocks, own, strict=True))
    if method == "feature":
        own = student.forward_head(student.forward_features(x), pre_logits=True)
        return logits, 1 - F.cosine_similarity(own, feature, dim=-1).mean()
    loss = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    return logits, loss


def compare(dual: DualViT, expected: tuple[Tensor, Tensor, Tensor], x: Tensor, tolerance: float) -> None:
    """The wrapper's logits, loss and gradients against the reference's."""
    logits, loss, grads = expected
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    assert relative_error(out.logits, logits) <= tolerance
    assert float(out.transfer_loss) == pytest.approx(float(loss), rel=tolerance)
    assert relative_error(gradient(dual.student), grads) <= tolerance


def backward(logits: Tensor, loss: Tensor, student: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    (logits.square().mean() + loss).backward()
    return logits, loss, gradient(student)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_method_equals_dense_reference(method: str, family: str) -> None:
    teacher, student = tiny(family, seed=1), tiny(family, seed=2)
    twin, x = copy.deepcopy(student), images(batch=1)
    expected = backward(*reference(method, teacher, twin, x), twin)
    for dtype, tolerance in PRECISIONS:
        dual = DualViT(copy.deepcopy(teacher).to(dtype), copy.deepcopy(student).to(dtype), method, weight=1.0)
        compare(dual, expected, x.to(dtype), tolerance)


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("family", ["vit", "vit_no_prefix", "dinov2_registers", "beit", "beit_shared"])
def test_distill_with_temperature(loss: str, temperature: float, family: str) -> None:
    teacher, student = tiny(family, seed=1), tiny(family, seed=2)
    twin, x = copy.deepcopy(student), images()
    with torch.no_grad():
        _, t = run(teacher, x)
    logits, s = run(twin, x)
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(t, s, strict=True):
        soft = (a.logits / temperature).softmax(-1)
        total = total + cross_entropy(soft, b.logits / temperature) * temperature**2
        if loss == "kl":
            total = total + (soft * soft.log()).sum(-1).mean() * temperature**2
    expected = backward(logits, total, twin)
    dual = DualViT(teacher, student, "distill", loss=loss, temperature=temperature, weight=1.0)
    compare(dual, expected, x, 1e-9)


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "beit", "eva02"])
def test_student_equal_to_teacher(family: str) -> None:
    teacher, x = tiny(family), images()
    kl = DualViT(teacher, copy.deepcopy(teacher), "distill", loss="kl")(x).transfer_loss
    assert abs(float(kl)) < 1e-12
    copied = DualViT(teacher, copy.deepcopy(teacher), "copy")(x).logits
    assert relative_error(copied, teacher(x)) < 1e-12
