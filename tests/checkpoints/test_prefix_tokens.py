"""Weights fit a model that keeps the positions of its prefix tokens in another way, at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.pretrained import load_pretrained, load_weights
from graftvit.models.errors import CheckpointError
from torch import Tensor, nn

Make = Callable[..., nn.Module]
TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True}


def saved(model: nn.Module, folder: Path) -> str:
    torch.save({"model": model.state_dict()}, folder / "source.pth")
    return str(folder / "source.pth")


def tokens(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = model.eval().forward_features(images)
        return features


@pytest.mark.parametrize("source", [{}, {"no_embed_class": True}])
@pytest.mark.parametrize("target", [{}, {"no_embed_class": True}])
def test_a_row_and_a_token_without_one_are_the_same(
    tiny: Make, tmp_path: Path, source: dict[str, Any], target: dict[str, Any]
) -> None:
    model = tiny(**source)
    teacher = load_pretrained(
        saved(model, tmp_path), model="vit_tiny_patch16_224", model_args={**TINY, **target}
    )
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(tokens(teacher.model, images), tokens(model, images), atol=1e-5)
    folded = "no_embed_class" in target and "no_embed_class" not in source
    assert ("cls_token: added to the tokens" in teacher.report.summary()) == folded
    resized = load_pretrained(
        saved(model, tmp_path), model="vit_tiny_patch16_224", model_args={**TINY, **target}, img_size=(24, 32)
    )
    assert resized.report.resampled == {"pos_embed": "from grid 4x4 to 6x8 (timm's bicubic)"}
    native: Any = load_pretrained(
        saved(model, tmp_path), model="vit_tiny_patch16_224", model_args={**TINY, **source}, img_size=(24, 32)
    ).model
    images = torch.randn(1, 3, 24, 32)
    assert torch.allclose(tokens(resized.model, images), tokens(native, images), atol=1e-5)


@pytest.mark.parametrize("method", ["timm", "mae"])
@pytest.mark.parametrize("arguments", [REGISTERS, {"reg_tokens": 4}, {"reg_tokens": 4, "img_size": 24}])
def test_a_student_with_registers_starts_from_weights_without(
    tiny: Make, tmp_path: Path, method: Any, arguments: dict[str, Any]
) -> None:
    model, student = tiny(), tiny(**arguments)
    fresh = student.reg_token.detach().clone()
    report = load_weights(student, saved(model, tmp_path), position_embedding=method)
    assert set(report.missing) == {"reg_token"}
    assert torch.equal(student.reg_token, fresh)
    rows = student.pos_embed.shape[1] - student.patch_embed.num_patches
    assert torch.equal(student.pos_embed[:, 1:rows], torch.zeros(1, max(rows - 1, 0), 16))
    first = student.cls_token + (student.pos_embed[:, :1] if rows else 0)
    assert torch.equal(first, model.cls_token + model.pos_embed[:, :1])
    if "img_size" not in arguments:
        assert torch.equal(student.pos_embed[:, rows:], model.pos_embed[:, 1:])


def test_without_its_registers_the_student_is_the_source(tiny: Make, tmp_path: Path) -> None:
    """Blocks that see no register give the source's tokens: all but the tokens is taken over."""
    model, student = tiny(), tiny(**REGISTERS)
    load_weights(student, saved(model, tmp_path))
    student.reg_token = None
    student.num_prefix_tokens = 1
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(tokens(student, images), tokens(model, images), atol=1e-5)


def test_a_student_without_a_class_token_leaves_it(tiny: Make, tmp_path: Path) -> None:
    model, student = tiny(), tiny(class_token=False, global_pool="avg")
    report = load_weights(student, saved(model, tmp_path))
    assert report.unexpected["cls_token"] == "the model has no such token"
    assert torch.equal(student.pos_embed, model.pos_embed[:, 1:])


def test_a_distilled_student_starts_from_plain_weights(tiny: Make, tmp_path: Path) -> None:
    student: Any = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, num_classes=0, **TINY)
    model = tiny()
    report = load_weights(student, saved(model, tmp_path))
    assert set(report.missing) == {"dist_token"}
    assert torch.equal(student.pos_embed[:, 1], torch.zeros(1, 16))
    assert torch.equal(student.pos_embed[:, 2:], model.pos_embed[:, 1:])


def test_a_teacher_needs_all_its_tokens(tiny: Make, tmp_path: Path) -> None:
    for model, arguments, said in (
        (tiny(), REGISTERS, "missing keys: reg_token"),
        (tiny(**REGISTERS), {}, "unexpected keys: reg_token"),
        (tiny(), {"class_token": False, "global_pool": "avg"}, "unexpected keys: cls_token"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_pretrained(
                saved(model, tmp_path), model="vit_tiny_patch16_224", model_args={**TINY, **arguments}
            )


def test_a_token_of_another_width_is_named_and_not_added(tiny: Make, tmp_path: Path) -> None:
    tensors = {**tiny().state_dict(), "cls_token": torch.zeros(1, 1, 8)}
    torch.save(tensors, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"cls_token is \(1, 1, 8\) and its position \(1, 1, 16\)"):
        load_pretrained(
            str(tmp_path / "source.pth"),
            model="vit_tiny_patch16_224",
            model_args={**TINY, "no_embed_class": True},
        )
