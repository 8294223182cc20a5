"""Several losses and several teachers in one step: the numbers of a dense float64 reference, and who runs once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.errors import ConfigError, TransferError, UnsupportedModelError
from graftvit.transfer.methods.dual import DualOutput, DualViT
from support.models.dense import cross_entropy, gradient, images, relative_error, run, tiny
from torch import Tensor, nn


def other(name: str = "test_convnext", seed: int = 5, classes: int = 5) -> nn.Module:
    """A small classifier of another architecture, every parameter random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=classes)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
    return model.double().eval()


THREE = [
    {"method": "distill", "weight": 3.0, "layers": "0,2"},
    {"method": "feature", "weight": 0.5, "feature_loss": "smooth_l1", "teacher": "convnext"},
    {"method": "logits", "weight": 2.0, "temperature": 2.0, "teacher": "convnext"},
]


def reference(
    vit: nn.Module, convnext: nn.Module, student: nn.Module, projector: nn.Module | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of the student and the three losses of `THREE`, in the plainest words."""
    x, features = images(), []
    hook = student.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    logits, layers = run(student, x)
    hook.remove()
    with torch.no_grad():
        maps = [layer.map for layer in run(vit, x)[1]]
        pooled = convnext.forward_features(x).mean((2, 3))
        pooled = convnext.head.norm(pooled[:, :, None, None]).flatten(1)
        classes = convnext(x)
    mapped = features[0] if projector is None else projector(features[0])
    return logits, {
        "distill": sum(cross_entropy(maps[i], layers[i].logits) for i in (0, 2)),
        "feature@convnext": F.smooth_l1_loss(mapped, pooled),
        "logits@convnext": 4
        * F.kl_div((logits / 2).log_softmax(-1), (classes / 2).softmax(-1), reduction="batchmean"),
    }


def step(dual: DualViT, x: Tensor) -> DualOutput:
    out = dual(x)
    (out.logits.square().mean() + out.transfer_loss).backward()
    return out


def test_three_losses_of_two_teachers_equal_the_reference() -> None:
    vit, convnext, student = tiny(seed=1), other(), tiny(seed=2)
    twin = copy.deepcopy(student)
    dual = DualViT({"teacher": vit, "convnext": convnext}, student, losses=THREE).double()
    projector = copy.deepcopy(dual.projectors["feature@convnext"]["feature"])
    out = step(dual, images())
    logits, losses = reference(vit, convnext, twin, projector)
    total = sum(entry["weight"] * loss for entry, loss in zip(THREE, losses.values(), strict=True))
    (logits.square().mean() + total).backward()
    assert relative_error(out.logits, logits) < 1e-12
    assert relative_error(out.transfer_loss, total) < 1e-10
    assert list(out.terms) == list(losses)
    assert all(relative_error(out.terms[name], losses[name]) < 1e-10 for name in losses)
    assert [name for name in out.parts if "layer" in name] == ["distill.layer00", "distill.layer02"]
    assert relative_error(gradient(student), gradient(twin)) < 1e-9
    learned = dual.projectors["feature@convnext"]["feature"]
    assert relative_error(learned.weight.grad, projector.weight.grad) < 1e-9


SAME_TEACHER = [
    ["distill", "attention_output", "block_output", "feature", "logits"],
    ["distill", "distill_q", "distill_k", "distill_v"],
    ["copy", "attention_output", "feature"],
    ["copy_q", "block_output", "logits"],
]


@pytest.mark.parametrize("methods", SAME_TEACHER, ids="+".join)
def test_losses_of_one_teacher_sum_and_run_it_once(methods: list[str]) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2)
    alone, logits = [], None
    copies = methods[0] if methods[0].startswith("copy") else None
    for method in methods:
        model = copy.deepcopy(student)
        entries = [{"method": copies}] if copies and method != copies else []
        out = DualViT(teacher, model, losses=[*entries, {"method": method, "weight": 1.0}])(images())
        alone.append(out.transfer_loss.detach())
        logits = out.logits.detach()
    calls: list[int] = []
    teacher.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    dual = DualViT(teacher, student, losses=[{"method": method, "weight": 1.0} for method in methods])
    out = dual(images())
    assert len(calls) == 1
    assert relative_error(out.transfer_loss, sum(alone)) < 1e-12
    assert logits is not None
    assert relative_error(out.logits, logits) < 1e-12


def test_one_entry_is_the_short_form() -> None:
    teacher, student, x = tiny(seed=1), tiny(seed=2), images()
    outs = []
    for options in ({"method": "distill", "weight": 2.0}, {"losses": [{"method": "distill", "weight": 2.0}]}):
        model = copy.deepcopy(student)
        out = step(DualViT(teacher, model, **options), x)
        outs.append((out.transfer_loss, gradient(model)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_two_teachers_of_one_kind_each_teach_every_layer() -> None:
    teachers = {"teacher": tiny(seed=1), "second": tiny(seed=3)}
    student, x = tiny(seed=2), images()
    expected = [
        DualViT(each, copy.deepcopy(student), "distill", weight=1.0)(x).transfer_loss.detach()
        for each in teachers.values()
    ]
    losses = [{"method": "distill", "weight": 1.0}, {"method": "distill", "weight": 1.0, "teacher": "second"}]
    out = DualViT(teachers, student, losses=losses)(x)
    assert relative_error(out.transfer_loss, sum(expected)) < 1e-12
    assert list(out.terms) == ["distill", "distill@second"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_is_put_back(checkpointing: bool) -> None:
    student = tiny(seed=2)
    before, kinds = copy.deepcopy(student), [type(module) for module in student.modules()]
    dual = DualViT({"teacher": tiny(seed=1), "convnext": other()}, student, losses=THREE).double().train()
    student.set_grad_checkpointing(checkpointing)
    step(dual, images())
    assert all(name.startswith(("student.", "projectors.")) for name in dual.state_dict())
    released = dual.release().eval()
    assert [type(module) for module in released.modules()] == kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in released.modules())
    assert torch.equal(released(images()), before(images()))


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        student = tiny(seed=2)
        torch.manual_seed(0)  # of the projector
        dual = DualViT({"teacher": tiny(seed=1), "convnext": other()}, student, losses=THREE).double().train()
        student.set_grad_checkpointing(enabled)
        step(dual, images())
        gradients.append(gradient(student))
    assert torch.equal(*gradients)


def test_a_copy_of_the_wrapper_is_its_own() -> None:
    dual = DualViT({"teacher": tiny(seed=1), "convnext": other()}, tiny(seed=2), losses=THREE).double()
    twin = copy.deepcopy(dual)
    first, second = dual(images()), twin(images())
    assert torch.equal(first.transfer_loss, second.transfer_loss)
    assert twin.teachers["convnext"] is not dual.teachers["convnext"]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("method", ["feature", "logits"])
def test_any_classifier_teaches_features_and_classes(name: str, method: str) -> None:
    teacher, student = other(name), tiny(seed=2, img_size=(64, 64))
    x = images(size=(64, 64))
    dual = DualViT(teacher, student, method).double()
    with torch.no_grad():
        shown = dual.teacher_input(x)
        features = teacher.forward_head(teacher.forward_features(shown), pre_logits=True)
        whole = teacher(shown) if method == "logits" else features
    out = step(dual, x)
    assert dual.terms[0].side.model is teacher
    taught = dual.teach(x)
    assert torch.equal(taught["teacher.classes" if method == "logits" else "teacher.pooled"], whole)
    recalled = dual(x, taught)
    assert torch.equal(recalled.transfer_loss, out.transfer_loss)
    assert torch.isfinite(out.transfer_loss)
    assert gradient(student).any()


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{"method": "distill", "teacher": "nosuch"}], "transfer.losses names the teacher 'nosuch'"),
        ([{"method": "distil"}], "transfer.losses.*distill"),
        ([{"method": "copy"}, {"method": "copy_q"}], "copies into layer 0 of the student twice"),
        (
            [{"method": "copy"}, {"method": "distill"}],
            "no attention of its own for transfer.losses",
        ),
        ([{"method": "distill"}, {"method": "copy", "layers": "0"}], "no attention of its own"),
    ],
)
def test_losses_that_do_not_go_together_are_refused(losses: list[Mapping[str, Any]], message: str) -> None:
    with pytest.raises((ConfigError, TransferError), match=message):
        DualViT(tiny(seed=1), tiny(seed=2), losses=losses)


def test_the_short_form_beside_losses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transfer.weight.*transfer.losses"):
        DualViT(tiny(seed=1), tiny(seed=2), weight=2.0, losses=[{"method": "distill"}])


def test_a_teacher_that_takes_no_image_of_this_size_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"ConvNeXt of teacher does not take images of 8x8"):
        DualViT(other(), tiny(seed=2, img_size=(8, 8)), "feature")


def test_drop_paths_are_not_shared_with_a_network_without_blocks() -> None:
    with pytest.raises(TransferError, match="share_drop_path needs a teacher with the blocks"):
        DualViT(other(), tiny(seed=2), "feature", share_drop_path=True)


def test_layers_of_another_architecture_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="supported are timm's plain vision transformers"):
        DualViT(other(), tiny(seed=2), "distill")


def test_a_distilled_layer_and_a_copied_one_learn_side_by_side() -> None:
    """Copy the first layers, distil the last: the student is saved with its teacher, and the loss is of the last."""
    losses = [{"method": "copy", "layers": "first:2"}, {"method": "distill", "layers": "last:1"}]
    dual = DualViT(tiny(seed=1), tiny(seed=2), losses=losses)
    out = step(dual, images())
    assert dual.needs_teacher
    assert list(out.parts) == ["distill", "distill.layer02"]
    assert not dual.student.blocks[0].attn.qkv.weight.grad[:64].any()
