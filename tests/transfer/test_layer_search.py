"""The layer search against every set of layers that could be kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from graftvit.models.conversion import convert, converted_layers, plan_of
from graftvit.models.errors import TransferError
from graftvit.transfer.layer_search import search_layers, tokens_of
from support.models.pyramids import images, tiny
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depth": 4, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 3,
}  # fmt: skip


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(30 if "blocks.2" in name else 8)
    return model


def batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.randn(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [(batch, batch) for batch in images]


def test_each_choice_is_the_best_of_its_round() -> None:
    teacher = vit()
    student = convert(teacher, "*: linear")
    found = search_layers(teacher, student, batches(), keep=4)
    error: dict[tuple[int, ...], float] = {}
    for size in range(5):
        for kept in itertools.combinations(range(4), size):
            plan = "*: linear" + "".join(f"; {layer}: softmax" for layer in kept)
            pairs = [(tokens_of(convert(teacher, plan), x), tokens_of(teacher, x)) for x, _ in batches()]
            error[kept] = float(torch.stack([(s - t).norm() / t.norm() for s, t in pairs]).mean())
    assert found.error == pytest.approx(error[()])
    done: list[int] = []
    for choice in found.kept:
        wanted = {layer: error[tuple(sorted([*done, layer]))] for layer in range(4) if layer not in done}
        assert {**choice.others, choice.layer: choice.error} == pytest.approx(wanted, abs=1e-6)
        assert choice.error == pytest.approx(min(wanted.values()), abs=1e-6)
        done.append(choice.layer)
    assert sorted(done) == [0, 1, 2, 3]
    assert found.kept[-1].error < 1e-5
    first = found.kept[0].layer
    assert plan_of(convert(teacher, found.plan_keeping(1))) == plan_of(
        convert(teacher, f"*: linear; {first}: softmax")
    )


def test_an_aligned_student_gets_the_teachers_layer_back() -> None:
    teacher = vit()
    student = convert(teacher, "1-2: linear")
    for layer in converted_layers(student).values():
        for parameter in layer.qkv.parameters():  # type: ignore[union-attr]
            parameter.data.add_(0.3)
    before = student(batches()[0][0])
    found = search_layers(teacher, student, batches(), keep=2)
    assert found.kept[-1].error < 1e-5
    assert set(found.kept[0].others) | {found.kept[0].layer} == {1, 2}
    assert torch.equal(student(batches()[0][0]), before)
    assert found.plan_keeping(2) == "*: softmax"


def test_mistakes_are_named() -> None:
    teacher = vit()
    with pytest.raises(TransferError, match=r"keep=3: the student has 2 converted layers"):
        search_layers(teacher, convert(teacher, "0-1: linear"), batches(), keep=3)
    with pytest.raises(TransferError, match="no layer of the student is converted"):
        search_layers(teacher, teacher, batches(), keep=1)
    other = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 3})
    with pytest.raises(TransferError, match="give the model that the student was converted from"):
        search_layers(other, convert(teacher, "*: linear"), batches(), keep=1)


@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_each_choice_in_a_pyramid_is_the_best_of_its_round(kind: str) -> None:
    teacher = tiny(kind).double()
    student, batch = convert(teacher, "0: linear; 2: linear", without=["bias"]), images((32, 32)).double()
    before = student(batch)
    found = search_layers(teacher, student, [(batch, batch)], keep=2)
    target = tokens_of(teacher, batch)
    errors = {}
    for kept in itertools.product((True, False), repeat=2):
        plan = f"0: {'keep' if kept[0] else 'linear'}; 2: {'keep' if kept[1] else 'linear'}"
        tokens = tokens_of(convert(teacher, plan, without=["bias"]), batch)
        errors[kept] = float((tokens - target).norm() / target.norm())
    assert found.error == pytest.approx(errors[False, False], rel=1e-4)
    first = found.kept[0]
    assert first.error == pytest.approx(min(errors[True, False], errors[False, True]), rel=1e-4)
    assert found.kept[1].error < 1e-6
    assert found.plan_keeping(2) == "*: keep"
    assert torch.equal(student(batch), before)
