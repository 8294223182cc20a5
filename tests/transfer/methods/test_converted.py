"""Transfer into a student whose attention is converted."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from graftvit.models.conversion import convert, converted_layers
from graftvit.models.errors import TransferError
from graftvit.transfer.methods.dual import DualViT
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": (16, 24), "patch_size": 4, "num_classes": 3,
}  # fmt: skip
IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    """A model whose attention is far from uniform, and whose logits depend on it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "head.weight" in name:
                parameter.mul_(20)
    return model


@pytest.mark.parametrize("method", ["attention_output", "block_output", "feature", "logits"])
def test_what_comes_out_of_a_converted_layer_is_matched(method: Any) -> None:
    teacher = vit()
    student = convert(teacher, "1-2: linear")
    dual = DualViT(teacher, student, method, weight=50.0, reduction="mean").train()
    out = dual(IMAGES)
    out.transfer_loss.backward()
    assert float(out.transfer_loss.detach()) > 0
    assert all(layer.qkv.weight.grad is not None for layer in converted_layers(student).values())  # type: ignore[union-attr]
    if method == "attention_output":
        assert set(out.parts) == {"layer00", "layer01", "layer02"}
        assert float(out.parts["layer00"]) == 0  # the kept layer of an unchanged copy


def test_the_error_is_that_of_the_layers_own_operator() -> None:
    teacher = vit()
    student = convert(teacher, "0: linear")
    seen: dict[str, torch.Tensor] = {}
    layer: Any = converted_layers(student)[0]
    layer.operator.register_forward_hook(lambda module, inputs, out: seen.update(out=out))
    dual = DualViT(teacher, student, "attention_output", layers=[0])
    part = dual(IMAGES).parts["layer00"]
    block: Any = teacher.blocks[0]  # type: ignore[index]
    tokens = block.norm1(teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(IMAGES))))  # type: ignore[operator]
    q, k, v = block.attn.qkv(tokens).reshape(2, 25, 3, 2, 8).permute(2, 0, 3, 1, 4)
    target = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(part, (seen["out"] - target).square().mean())


def test_the_student_is_released_as_it_was() -> None:
    teacher = vit()
    student = convert(teacher, "0: linear")
    before = student.eval()(IMAGES)
    dual = DualViT(teacher, student, "attention_output")
    dual(IMAGES)
    released = dual.release()
    assert list(converted_layers(released)) == [0]
    assert not converted_layers(released)[0].operator._forward_hooks  # type: ignore[union-attr]
    assert torch.equal(released.eval()(IMAGES), before)


@pytest.mark.parametrize("method", ["copy", "distill", "copy_v", "distill_q"])
def test_maps_of_a_converted_layer_are_refused_by_name(method: Any) -> None:
    teacher = vit()
    with pytest.raises(TransferError, match="layer 1 of the student has linear in place of softmax"):
        DualViT(teacher, convert(teacher, "1: linear"), method)


def test_a_map_is_promised_only_where_there_is_one() -> None:
    teacher = vit()
    with pytest.raises(TransferError, match=r"use mode=align, or transfer\.method"):
        DualViT(teacher, convert(teacher, "1: linear"), "distill")
    with pytest.raises(TransferError, match=r"use mode=align with align\.match=output, or transfer\.method"):
        DualViT(teacher, convert(teacher, "1: attnzero_105"), "distill")


@pytest.mark.parametrize("method", ["copy", "distill", "attention_output"])
def test_a_converted_teacher_has_no_attention_to_give(method: Any) -> None:
    student = vit()
    with pytest.raises(TransferError, match="layer 1 of the teacher has linear"):
        DualViT(convert(vit(), "1: linear"), student, method)
    assert DualViT(convert(vit(), "1: linear"), student, "logits")(IMAGES).transfer_loss.isfinite()
