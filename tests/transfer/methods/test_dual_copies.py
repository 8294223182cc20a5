"""One `DualViT` a student, and copies of it that are whole: deepcopy, pickle, release."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import gradient, images, tiny

METHODS = [
    "copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v",
    "attention_output", "block_output", "feature", "logits",
]  # fmt: skip


def step(dual: DualViT) -> tuple[torch.Tensor, torch.Tensor]:
    """The transfer loss and the gradients of one step."""
    dual.zero_grad()
    out = dual(images())
    (out.logits.square().mean() + out.transfer_loss).backward()
    return out.transfer_loss.detach(), gradient(dual)


def pickled(dual: DualViT) -> DualViT:
    return pickle.loads(pickle.dumps(dual))


@pytest.mark.parametrize(
    ("method", "ran"), [*((method, True) for method in METHODS), ("copy", False), ("distill", False)]
)
def test_a_copy_gives_the_same_loss_and_gradients(method: str, ran: bool) -> None:
    width = {"embed_dim": 48} if method in ("block_output", "feature") else {}  # with projectors
    dual = DualViT(tiny(seed=1, depth=2, **width), tiny(seed=2, depth=2), method)
    if ran:
        dual(images())  # leaves a step behind
        dual.student(images())
    twins = [duplicate(dual) for duplicate in (copy.deepcopy, pickled)]
    expected = step(dual)
    del dual
    gc.collect()
    for twin in twins:
        assert all(torch.equal(*pair) for pair in zip(step(twin), expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_releasing_a_copy_leaves_the_original_alone(method: str) -> None:
    dual = DualViT(tiny("eva02", seed=1, depth=2), tiny("eva02", seed=2, depth=2), method)
    twin = copy.deepcopy(dual)
    trained = [p.requires_grad for p in dual.student.parameters()]
    expected = step(dual)
    released = twin.release(bare=twin.needs_teacher)
    assert all(p.requires_grad for p in released.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in released.modules())
    assert [p.requires_grad for p in dual.student.parameters()] == trained
    assert all(torch.equal(*pair) for pair in zip(step(dual), expected, strict=True))


def test_a_copy_is_in_use_as_well() -> None:
    twin = copy.deepcopy(DualViT(tiny(seed=1), tiny(seed=2)))
    with pytest.raises(TransferError, match="another DualViT"):
        DualViT(tiny(seed=1), twin.student)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_does_not_teach_itself(method: str) -> None:
    model = tiny()
    shared = copy.deepcopy(model)
    shared.blocks[1].mlp = model.blocks[1].mlp
    for student in (model, shared):
        with pytest.raises(TransferError, match="share their weights"):
            DualViT(model, student, method)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_student_has_one_wrapper_at_a_time(method: str) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    dual = DualViT(teacher, student, method)
    expected = step(dual)
    for second in (lambda: DualViT(teacher, student), lambda: DualViT(student, tiny(seed=3), "logits")):
        with pytest.raises(TransferError, match=r"of another DualViT.*release\(\)"):
            second()
    with pytest.raises(TransferError, match=r"of another DualViT.*release\(\)"):
        dual.with_student(student)
    assert all(torch.equal(*pair) for pair in zip(step(dual), expected, strict=True))
    dual.release(bare=dual.needs_teacher)
    again = DualViT(teacher, student, method)
    assert all(torch.equal(*pair) for pair in zip(step(again), expected, strict=True))
    dual.release(bare=dual.needs_teacher)  # a second time: it is not its student any more
    assert all(torch.equal(*pair) for pair in zip(step(again), expected, strict=True))


def test_a_wrapper_that_is_gone_leaves_nothing_behind() -> None:
    teacher, student = tiny("eva02", seed=1), tiny("eva02", seed=2)
    for method in ("copy", "block_output", "feature"):
        DualViT(teacher, student, method)
        dual = DualViT(teacher, student, "distill")
        assert all(parameter.requires_grad for parameter in student.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
        del dual


@pytest.mark.parametrize("method", METHODS)
def test_what_was_released_is_not_taught(method: str) -> None:
    dual = DualViT(tiny(seed=1), tiny(seed=2), method)
    student = dual.release(bare=dual.needs_teacher)
    with pytest.raises(TransferError, match="was released"):
        dual(images())
    if dual.needs_teacher:
        with pytest.raises(TransferError, match="was released"):
            dual.predict(images())
    else:
        assert torch.equal(dual.predict(images()), student(images()))


def test_a_student_that_cannot_be_taught_is_left_as_it_was() -> None:
    teacher, student = tiny(seed=1, num_classes=3), tiny(seed=2)
    plain = [type(module) for module in student.modules()]
    with pytest.raises(TransferError, match="one set of classes"):
        DualViT(teacher, student, "logits")
    with pytest.raises(TransferError, match="as deep as"):
        DualViT(tiny(seed=1, depth=4), student, "copy", layers=[(3, 2)], share_drop_path=True)
    assert [type(module) for module in student.modules()] == plain
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_teacher_stays_in_eval_mode() -> None:
    teacher = tiny(seed=1, drop_path_rate=0.5, proj_drop_rate=0.5)
    dual = DualViT(teacher, tiny(seed=2), "block_output").train()
    expected = dual(images()).transfer_loss
    teacher.train()
    assert torch.equal(dual(images()).transfer_loss, expected)


def test_a_teacher_in_use_does_not_become_a_student() -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    dual = DualViT(teacher, student, "copy")
    with pytest.raises(TransferError, match="the student is the teacher of another DualViT"):
        DualViT(tiny(seed=3), teacher)
    del dual
    wider = tiny(seed=3, embed_dim=48)
    with pytest.raises(TransferError, match="every weight of the student is frozen"):
        DualViT(wider, teacher, "block_output")
    DualViT(wider, teacher.requires_grad_(True), "block_output")


@pytest.mark.parametrize("method", ["block_output", "feature"])
def test_a_student_whose_losses_are_not_seen_is_refused(method: str) -> None:
    student = tiny(seed=2)
    dual = DualViT(tiny(seed=1), student, method)
    for module in student.modules():
        module._forward_hooks.clear()  # as a student that was compiled before calls none
        module._forward_pre_hooks.clear()
    with pytest.raises(TransferError, match="it was compiled before it was taught"):
        dual(images())
