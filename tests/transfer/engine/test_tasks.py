"""What a step computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.mae import MaskedAutoencoder
from graftvit.transfer.engine.modes import ClassificationTask, PretrainTask, TransferTask, classification_loss
from graftvit.transfer.methods.dual import DualViT
from support.runs.engine_runs import tiny_vit
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_class_indices_get_label_smoothing(smoothing: float) -> None:
    logits, targets = torch.randn(6, 10), torch.randint(10, (6,))
    torch.testing.assert_close(
        classification_loss(logits, targets, smoothing),
        LabelSmoothingCrossEntropy(smoothing)(logits, targets),
    )


def test_probabilities_are_smoothed_already() -> None:
    logits, targets = torch.randn(6, 10), torch.rand(6, 10).softmax(-1)
    torch.testing.assert_close(
        classification_loss(logits, targets, 0.3), SoftTargetCrossEntropy()(logits, targets)
    )


def test_the_loss_is_in_float32_under_half_precision() -> None:
    assert classification_loss(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), 0.1).dtype == torch.float32


def test_transfer_adds_the_weighted_loss_and_names_its_parts() -> None:
    torch.manual_seed(0)
    dual = DualViT(tiny_vit(), tiny_vit(), "distill", weight=2.0)
    task = TransferTask(dual, smoothing=0.1)
    images, targets = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    losses = task(images, targets)
    assert list(losses) == ["loss", "task", "transfer", "layer00", "layer01"]
    torch.testing.assert_close(losses["transfer"], 2 * (losses["layer00"] + losses["layer01"]))
    torch.testing.assert_close(losses["loss"], losses["task"] + losses["transfer"])
    torch.testing.assert_close(
        losses["task"], F.cross_entropy(task.predict(images), targets, label_smoothing=0.1)
    )


def test_copying_has_no_transfer_loss_and_predicts_through_the_teacher() -> None:
    torch.manual_seed(0)
    dual = DualViT(tiny_vit(), tiny_vit(), "copy")
    task = TransferTask(dual, smoothing=0.0).eval()
    images = torch.randn(4, 1, 8, 8)
    assert list(task(images, torch.zeros(4, dtype=torch.long))) == ["loss", "task"]
    before = task.predict(images)
    with torch.no_grad():
        for name, parameter in dual.teacher.named_parameters():
            if "qkv" in name:
                parameter.mul_(50)
    assert not torch.equal(task.predict(images), before)


def test_the_teacher_is_no_part_of_any_task() -> None:
    student = tiny_vit()
    task = TransferTask(DualViT(tiny_vit(depth=4), student, "distill", layers="first:2"), smoothing=0.0)
    assert task.trainable is student
    assert {name.removeprefix("dual.student.") for name in task.state_dict()} == set(student.state_dict())
    task.train()
    assert not task.dual.teacher.training


def test_the_weights_of_every_task_are_named_after_the_student() -> None:
    autoencoder = MaskedAutoencoder(
        tiny_vit(num_classes=0, global_pool="token"), decoder_dim=8, decoder_depth=1, decoder_heads=2
    )
    tasks = [
        ClassificationTask(tiny_vit(), 0.0),
        PretrainTask(autoencoder),
        TransferTask(DualViT(tiny_vit(), tiny_vit()), 0),
    ]
    for task in tasks:
        assert all(name.startswith("student.") for name in task.saved.state_dict())
        assert len(task.shard_units) == 2
    images = torch.randn(4, 1, 8, 8)
    assert tasks[1](images, torch.zeros(4)).keys() == {"loss"}
