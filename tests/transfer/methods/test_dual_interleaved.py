"""Forwards and backwards in any order: each backward pass belongs to its own forward pass, recomputed or not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualOutput, DualViT
from support.models.copied_models import pair, whole
from support.models.dense import gradient, images, relative_error, tiny
from torch import Tensor

METHODS = [
    "copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v",
    "attention_output", "block_output", "feature", "logits",
]  # fmt: skip


def total(out: DualOutput) -> Tensor:
    return out.logits.square().mean() + out.transfer_loss


def two(method: str, family: str = "vit", **options: object) -> tuple[DualViT, DualViT]:
    """The same pair of two blocks without and with gradient checkpointing."""
    teacher, student = tiny(family, seed=1, depth=2), tiny(family, seed=2, depth=2)
    duals = [DualViT(teacher, copy.deepcopy(student), method, **options).train() for _ in range(2)]
    duals[1].student.set_grad_checkpointing(True)
    return duals[0], duals[1]


def batches(count: int = 2) -> list[Tensor]:
    return [images(batch=2) * (index + 1) - index for index in range(count)]


def both_then_backward(dual: DualViT) -> None:
    first, second = batches()
    losses = [total(dual(first)), total(dual(second))]
    sum(losses).backward()


def first_after_second(dual: DualViT) -> None:
    first, second = batches()
    one = total(dual(first))
    total(dual(second)).backward()
    one.backward()


def in_order(dual: DualViT) -> None:
    losses = [total(dual(x)) for x in batches(3)]
    for loss in losses:
        loss.backward()


def predict_between(dual: DualViT) -> None:
    first, second = batches()
    loss = total(dual(first))
    dual.predict(second)
    loss.backward()


def student_between(dual: DualViT) -> None:
    first, second = batches()
    loss = total(dual(first)) + dual.student(second).square().sum()
    loss.backward()


def evaluation_between(dual: DualViT) -> None:
    first, second = batches()
    loss = total(dual(first))
    dual.eval()
    with torch.no_grad():
        dual(second)
    dual.train()
    loss.backward()


def twice(dual: DualViT) -> None:
    loss = total(dual(batches()[0]))
    loss.backward(retain_graph=True)
    total(dual(batches()[1]))
    loss.backward()


ORDERS = [
    both_then_backward, first_after_second, in_order, predict_between, student_between, evaluation_between, twice,
]  # fmt: skip
CASES = [
    (method, order)
    for method in METHODS
    for order in (ORDERS if method in ("copy", "copy_q", "distill", "logits") else [first_after_second])
]
"""Every order with methods that hold of a forward pass a map, projections or nothing; every method out of order."""


@pytest.mark.parametrize(("method", "order"), CASES)
def test_recomputation_reads_what_its_own_forward_gave(method: str, order: Callable[[DualViT], None]) -> None:
    plain, saving = two(method)
    for dual in (plain, saving):
        order(dual)
    assert torch.equal(gradient(plain.student), gradient(saving.student))


@pytest.mark.parametrize("family", ["eva02", "beit", "dinov2_registers", "deit_distilled"])
def test_of_every_family(family: str) -> None:
    for dual in (duals := two("distill", family)):
        both_then_backward(dual)
    assert torch.equal(*(gradient(dual.student) for dual in duals))


def test_drop_path_masks_belong_to_their_forward() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2, drop_path_rate=0.5)
    grads = []
    for enabled in (False, True):
        dual = DualViT(teacher, copy.deepcopy(student), "distill", share_drop_path=True).train()
        dual.student.set_grad_checkpointing(enabled)
        torch.manual_seed(0)
        losses = [total(dual(x)) for x in batches(2)]
        for loss in losses:
            loss.backward()
        grads.append(gradient(dual.student))
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", ["copy", "copy_q"])
@pytest.mark.parametrize("between", [False, True])
def test_a_copied_model_that_is_loaded(method: str, between: bool) -> None:
    dual, teacher = pair("alike", method)
    grads = []
    for enabled in (False, True):
        model = whole(dual, teacher).train()
        model.set_grad_checkpointing(enabled)
        losses = [model(images() * scale).square().sum() for scale in (1, 2)]
        if between:
            with torch.no_grad():
                model.eval()(images())
            model.train()
        for loss in losses:
            loss.backward()
        grads.append(gradient(model))
        assert isinstance(model.blocks, torch.nn.Module)
    assert relative_error(*grads) < 1e-12


@pytest.mark.parametrize("change", ["weights", "new weights", "mode", "release"])
def test_what_a_recomputation_cannot_give_back_is_refused(change: str) -> None:
    _, dual = two("distill")
    loss = total(dual(images()))
    if change == "weights":
        with torch.no_grad():
            dual.student.blocks[1].mlp.fc1.weight.mul_(2)
    elif change == "new weights":
        dual.student.blocks[1].load_state_dict(dual.student.blocks[1].state_dict(), assign=True)
    elif change == "mode":
        dual.eval()
    else:
        dual.release()
    with pytest.raises(TransferError, match="between a forward pass and its backward"):
        loss.backward()


def test_reentrant_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", True)
    _, dual = two("distill")
    with pytest.raises(TransferError, match="TIMM_REENTRANT_CKPT"):
        dual(images())
    assert isinstance(dual.student.blocks, torch.nn.Module)


def test_a_forward_that_fails_leaves_the_student_as_it_was() -> None:
    _, dual = two("distill")
    expected = dual.student.eval()(images())
    handle = dual.student.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dual(images())
    handle.remove()
    assert isinstance(dual.student.blocks, torch.nn.Module)
    assert torch.equal(dual.student(images()), expected)


def test_a_step_is_freed_with_its_backward() -> None:
    _, dual = two("distill")
    seen: list[weakref.ref[object]] = []
    dual.student.blocks[0].register_forward_pre_hook(
        lambda *_: seen.append(weakref.ref(dual._tapes["teacher"].step))
    )
    loss = total(dual(images()))
    assert seen[0]() is not None
    loss.backward()
    gc.collect()
    assert seen[0]() is None
