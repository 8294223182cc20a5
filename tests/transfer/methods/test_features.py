"""Pooled features and features of patches against a dense float64 reference, on equal and on unequal grids."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from graftvit.models.errors import TransferError
from graftvit.transfer import DualViT, OutsideTeacher
from graftvit.transfer.methods.feature import average_to
from support.models.dense import gradient, images, relative_error, tiny
from torch import Tensor, nn


def convolutional(name: str = "test_resnet", seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5).double().eval()


def patches_of(model: nn.Module, x: Tensor) -> Tensor:
    """Tokens after the final norm without the class token, (B, 4, 6, C)."""
    features: Tensor = model.forward_features(x)
    return features[:, 1:].reshape(len(x), 4, 6, -1)


LOSSES = {
    "cosine": lambda s, t: (1 - (F.normalize(s, dim=-1) * F.normalize(t, dim=-1)).sum(-1)).mean(),
    "smooth_l1": F.smooth_l1_loss,
    "mse": lambda s, t: (s - t).square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_and_patches_of_a_vision_transformer(pool: str, loss: str) -> None:
    teacher, student, x = tiny(seed=1, embed_dim=48), tiny(seed=2, global_pool=pool), images()
    twin = copy.deepcopy(student)
    dual = DualViT(teacher, student, "feature", tokens="both", feature_loss=loss, weight=2.0)
    projectors = copy.deepcopy(dual.projectors)
    out = dual(x)
    out.transfer_loss.backward()

    pooled = twin.forward_head(twin.forward_features(x), pre_logits=True)
    theirs = teacher.forward_head(teacher.forward_features(x), pre_logits=True).detach()
    expected = {
        "feature": LOSSES[loss](projectors["feature"](pooled), theirs),
        "patches": LOSSES[loss](projectors["patches"](patches_of(twin, x)), patches_of(teacher, x).detach()),
    }
    total = 2 * (expected["feature"] + expected["patches"])
    total.backward()
    assert set(out.parts) == set(expected)
    assert all(relative_error(out.parts[name], expected[name]) < 1e-12 for name in expected)
    assert relative_error(out.transfer_loss, total) < 1e-12
    assert relative_error(gradient(student), gradient(twin)) < 1e-10
    assert relative_error(gradient(dual.projectors), gradient(projectors)) < 1e-10


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (2, 3)), ((96, 96), (3, 3)), ((32, 64), (1, 2))])
def test_patches_are_averaged_to_the_coarser_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """A ResNet has 32 pixels a patch, the student 8."""
    teacher, student, x = convolutional(), tiny(seed=2, img_size=size), images(size=size)
    dual = DualViT(teacher, student, "feature", tokens="patches", feature_loss="mse", weight=1.0)
    projector = copy.deepcopy(dual.projectors["patches"])
    out = dual(x)
    own = student.forward_features(x)[:, 1:].reshape(2, size[0] // 8, size[1] // 8, -1)
    pooled = F.adaptive_avg_pool2d(own.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    target = teacher.forward_features(dual.teacher_input(x)).permute(0, 2, 3, 1)
    assert target.shape[1:3] == grid
    assert relative_error(out.transfer_loss, F.mse_loss(projector(pooled), target)) < 1e-12


@pytest.mark.parametrize(
    ("fine", "coarse"), [((6, 6), (4, 3)), ((5, 7), (3, 7)), ((4, 4), (4, 4)), ((3, 5), (1, 1))]
)
def test_the_average_is_over_areas(fine: tuple[int, int], coarse: tuple[int, int]) -> None:
    x = torch.randn(2, *fine, 3, dtype=torch.float64)
    split = x.repeat_interleave(coarse[0], 1).repeat_interleave(coarse[1], 2)  # each patch in equal cells
    cells = split.reshape(2, coarse[0], fine[0], coarse[1], fine[1], 3)
    assert relative_error(average_to(x, coarse), cells.mean((2, 4))) < 1e-14


@pytest.mark.parametrize(
    "family", ["deit_distilled", "dinov2_registers", "siglip", "beit", "eva02", "dinov3"]
)
def test_patches_of_every_family(family: str) -> None:
    changes = {"patch_size": 8} if family in ("dinov2_registers", "eva02") else {}
    teacher, student = tiny(family, seed=1, **changes), tiny(family, seed=2, **changes)
    x = images()
    dual = DualViT(teacher, student, "feature", tokens="patches", feature_loss="mse", weight=1.0)
    loss = dual(x).transfer_loss
    prefix = student.num_prefix_tokens
    both = [
        model.forward_features(each)[:, prefix:]
        for model, each in ((student, x), (teacher, dual.teacher_input(x)))
    ]
    assert both[0].shape[1] == 24
    assert relative_error(loss, F.mse_loss(*both)) < 1e-12


@pytest.mark.slow
def test_a_compiled_step_has_no_graph_break() -> None:
    torch.compiler.reset()
    teacher, student, x = convolutional(), tiny(seed=2, img_size=(64, 64)), images(size=(64, 64))
    dual = DualViT(teacher, student, "feature", tokens="both")
    expected = dual(x).transfer_loss
    dual.compile(backend="eager", fullgraph=True)
    assert relative_error(dual(x).transfer_loss, expected) < 1e-12


def outside(model: Any, x: Tensor) -> dict[str, Tensor]:
    features = model.forward_features(x)
    return {"patches": features, "pooled": features.mean((2, 3))}


def test_a_model_of_another_library_gives_patches_as_a_map_or_as_a_list() -> None:
    model, x = convolutional(), images(size=(64, 64))
    width = model.num_features
    student = tiny(seed=2, img_size=(64, 64), patch_size=32)  # the grid of the teacher
    losses = []
    for results in (
        lambda x: outside(model, x),
        lambda x: {"patches": outside(model, x)["patches"].flatten(2).transpose(1, 2)},
    ):
        torch.manual_seed(0)  # of the projector
        dual = DualViT(
            OutsideTeacher(results, patch_width=width), student, "feature", tokens="patches"
        ).double()
        losses.append(dual(x).transfer_loss.detach())
        student = dual.release()
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda x: {"classes": x.mean((2, 3))}, "returned nothing as 'patches', and patch_width=4 says"),
        (lambda x: {"patches": x}, r"returned \(2, 3, 32, 48\) as 'patches'"),
        (
            lambda x: {"patches": torch.zeros(2, 5, 4)},
            "5 patches without their grid, and the student has 4x6",
        ),
    ],
)
def test_wrong_patches_are_named(results: Any, message: str) -> None:
    dual = DualViT(OutsideTeacher(results, patch_width=4), tiny(seed=2), "feature", tokens="patches").double()
    with pytest.raises(TransferError, match=message):
        dual(images())


def test_a_student_that_drops_patches_is_refused() -> None:
    student = tiny(seed=2, patch_drop_rate=0.5).train()
    with pytest.raises(TransferError, match="patch_drop_rate to 0"):
        DualViT(tiny(seed=1), student, "feature", tokens="patches")(images())
