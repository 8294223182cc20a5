"""A student that is taught within another model: the losses of a step, and of a batch that is padded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from graftvit.models import convert
from graftvit.models.errors import TransferError
from graftvit.transfer import DualViT
from torch import Tensor, nn

PAD = ((20, 48), (32, 28))
"""Rows and columns of two images in a batch of 32 x 48: 5 and 8 of 8 rows of patches, 12 and 7 of 12 columns."""


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=5, dynamic_img_size=True, **sizes)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.2)
    return teacher.double(), convert(copy.deepcopy(teacher), "*: linear").double()


def images() -> Tensor:
    found = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for image, (rows, columns) in zip(found, PAD, strict=True):
        image[:, rows:], image[:, :, columns:] = 0, 0
    return found


def run(dual: DualViT, x: Tensor) -> None:
    student: Any = dual.student
    student.forward_intermediates(x, intermediates_only=True)


@pytest.mark.parametrize("method", ["attention_output", "block_output"])
def test_it_is_the_step_of_the_whole_student(method: Any) -> None:
    dual = DualViT(*pair(), method=method, weight=3.0)
    whole = dual(images())
    with dual.teaching(images()) as lesson:
        run(dual, images())
    assert torch.equal(lesson.loss, whole.transfer_loss)
    assert {name: value.item() for name, value in lesson.parts.items()} == {
        name: value.item() for name, value in whole.parts.items()
    }


def blocks_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out))
        for block in model.get_submodule("blocks")
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return found


def test_tokens_in_the_padding_do_not_count() -> None:
    teacher, student = pair()
    dual = DualViT(teacher, student, method="block_output").eval()
    with dual.teaching(images(), PAD) as lesson:
        run(dual, images())
    inside = torch.zeros(2, 8, 12, dtype=torch.bool)
    inside[0, :5], inside[1, :, :7] = True, True
    inside = torch.cat([torch.ones(2, 1, dtype=torch.bool), inside.flatten(1)], 1)
    alone = dual.release()
    for layer, (theirs, ours) in enumerate(
        zip(blocks_of(teacher, images()), blocks_of(alone, images()), strict=True)
    ):
        expected = (theirs - ours)[inside].square().mean()
        assert torch.allclose(lesson.parts[f"layer{layer:02d}"], expected, rtol=1e-12)


def test_the_gradient_reaches_the_student_alone() -> None:
    teacher, student = pair()
    dual = DualViT(teacher, student, method="attention_output")
    with dual.teaching(images(), PAD) as lesson:
        run(dual, images())
    lesson.loss.backward()
    assert any(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_checkpointed_blocks_run_again_with_what_they_were_taught() -> None:
    gradients = []
    for checkpointed in (False, True):
        teacher, student = pair()
        dual: Any = DualViT(teacher, student, method="attention_output")
        dual.student.set_grad_checkpointing(checkpointed)
        with dual.teaching(images(), PAD) as lesson:
            out = dual.student.forward_features(images())
        (lesson.loss + out.square().mean()).backward()
        gradients.append(
            [parameter.grad for parameter in dual.student.parameters() if parameter.grad is not None]
        )
    assert all(torch.allclose(*each) for each in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", ["feature", "logits", "copy", "copy_q"])
def test_what_needs_a_whole_classifier_is_refused(method: Any) -> None:
    teacher = pair()[0]
    dual = DualViT(teacher, copy.deepcopy(teacher), method=method)
    with pytest.raises(TransferError), dual.teaching(images()):
        pass


def test_a_student_that_did_not_run_is_named() -> None:
    dual = DualViT(*pair(), method="block_output")
    with pytest.raises(TransferError), dual.teaching(images()):
        pass
    with pytest.raises(KeyError), dual.teaching(images()):
        raise KeyError
    assert dual(images()).transfer_loss.isfinite()
