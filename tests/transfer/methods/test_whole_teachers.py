"""Classes and features of whole teachers: hard labels, DeiT's distillation token, and models of other libraries."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.errors import TransferError, UnsupportedModelError
from graftvit.transfer import DualViT, OutsideTeacher
from graftvit.transfer.engine.modes import classification_loss
from graftvit.transfer.methods.method import describe_transfer
from support.models.dense import gradient, images, relative_error, tiny
from torch import Tensor, nn


def test_hard_labels_are_the_cross_entropy_with_the_teachers_class() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images(batch=8)
    twin = copy.deepcopy(student)
    loss = DualViT(teacher, student, "logits", logits_loss="hard", weight=1.0)(x).transfer_loss
    loss.backward()
    expected = F.cross_entropy(twin(x), teacher(x).argmax(-1))
    expected.backward()
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(gradient(student), gradient(twin)) < 1e-12
    with pytest.raises(TransferError, match=r"temperature=2 changes nothing with transfer.logits_loss=hard"):
        DualViT(teacher, tiny(seed=3), "logits", logits_loss="hard", temperature=2.0)
    assert "hard-label" in describe_transfer({"method": "logits", "logits_loss": "hard"})[0][1]
    assert "KL" in describe_transfer({"method": "logits"})[0][1]  # a student of an older version


@pytest.mark.parametrize("loss", ["kl", "hard"])
def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels(loss: str) -> None:
    """DeiT (arXiv:2012.12877): the student's prediction is the mean of both heads, and each head has its own target."""
    teacher, student, x = tiny(seed=1), tiny("deit_distilled", seed=2), images(batch=4)
    twin, labels = copy.deepcopy(student), torch.tensor([0, 1, 2, 3])
    dual = DualViT(teacher, student, "logits", logits_loss=loss, logits_head="distillation", weight=1.0)
    out = dual(x)
    (classification_loss(out.logits, labels, 0.0) + out.transfer_loss).backward()

    tokens = twin.forward_features(x)
    own, distilled = twin.head(tokens[:, 0]), twin.head_dist(tokens[:, 1])
    classes = teacher(dual.teacher_input(x))
    target = F.cross_entropy(distilled, classes.argmax(-1))
    if loss == "kl":
        target = F.kl_div(distilled.log_softmax(-1), classes.softmax(-1), reduction="batchmean")
    (F.cross_entropy(own.float(), labels) + target).backward()
    assert relative_error(out.transfer_loss, target) < 1e-12
    assert torch.equal(out.logits, own)
    assert relative_error(gradient(student), gradient(twin)) < 1e-6  # the task's loss is in float32
    assert relative_error(dual.predict(x), (own + distilled) / 2) < 1e-12
    assert not any(module._forward_hooks for module in dual.release().modules())
    with pytest.raises(TransferError, match="needs a student with a head for a distillation token"):
        DualViT(teacher, tiny(seed=3), "logits", logits_head="distillation")


class Output(OrderedDict[str, Tensor]):
    """As transformers return them: a mapping with attributes."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def resnet() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).double().eval()


def named(model: Any, pooled: str, classes: str) -> Any:
    def run(x: Tensor) -> Output:
        features = model.forward_features(x)
        return Output(
            {pooled: model.forward_head(features, pre_logits=True), classes: model.forward_head(features)}
        )

    return run


@pytest.mark.parametrize("names", [("pooled", "classes"), ("pooler_output", "logits")])
@pytest.mark.parametrize("method", ["feature", "logits"])
def test_a_function_teaches_as_the_model_within(method: str, names: tuple[str, str]) -> None:
    model, x = resnet(), images()
    spec = model.pretrained_cfg
    outside = OutsideTeacher(
        named(model, *names),
        feature_width=model.num_features,
        num_classes=5,
        mean=spec["mean"],
        std=spec["std"],
    )
    losses = []
    for teacher in (model, outside):
        torch.manual_seed(0)  # of the projector
        losses.append(DualViT(teacher, tiny(seed=2), method).double()(x).transfer_loss)
    assert torch.equal(*losses)


def test_a_function_that_returns_a_tensor_and_sees_images_of_its_own_size() -> None:
    seen: list[tuple[int, ...]] = []

    def classes(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x.mean((2, 3)) @ torch.ones(3, 5, dtype=x.dtype)

    teacher = OutsideTeacher(classes, num_classes=5, img_size=(16, 24))
    out = DualViT({"vit": tiny(seed=1), "function": teacher}, tiny(seed=2), losses=[
        {"method": "distill"}, {"method": "logits", "teacher": "function"},
    ])(images())  # fmt: skip
    assert seen == [(2, 3, 16, 24)]
    assert set(out.terms) == {"distill", "logits@function"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda x: x, {}, "teaches nothing: give its feature_width"),
        (lambda x: x.mean((2, 3)), {"num_classes": 5}, r"returned \(2, 3\) as 'classes', and num_classes=5"),
        (lambda x: {"pooled": x.mean((2, 3))}, {"num_classes": 5}, r"returned nothing as 'classes'"),
        (
            lambda x: {"other": x},
            {"num_classes": 5},
            r"returned a dict without results; valid are a tensor, or",
        ),
        (lambda x: None, {"num_classes": 5}, r"returned a NoneType without results"),
    ],
)
def test_a_wrong_result_is_named(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        DualViT(OutsideTeacher(model, **options), tiny(seed=2), "logits")(images())


@pytest.mark.parametrize("teacher", [nn.Linear(3, 5), lambda x: x])
def test_a_model_of_another_library_needs_a_description(teacher: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="OutsideTeacher"):
        DualViT(teacher, tiny(seed=2), "logits")


def test_the_example_of_the_page_runs() -> None:
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[3] / "docs" / "transfer.md").read_text()
    (code,) = re.findall(
        r"```python\n(import timm\nfrom graftvit.transfer import DualViT, OutsideTeacher.*?)```",
        page,
        re.DOTALL,
    )
    names: dict[str, Any] = {}
    exec(code, names)
    x = torch.randn(2, 3, 224, 224)
    assert torch.isfinite(names["dual"](x).transfer_loss)
    assert torch.isfinite(DualViT(names["features"], names["dual"].release(), "feature")(x).transfer_loss)
