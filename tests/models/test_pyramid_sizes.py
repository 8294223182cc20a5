"""Pyramids at another image size: their windows stay, and what was resized is built again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert, resize
from graftvit.models.copying.teacher_view import Normalization, WholeInput
from support.models.pyramids import TINY, arguments, images, tiny
from torch import Tensor, nn

PLANS = (None, "stage2: linear", "0: softmax; 2: none")
BIGGER = (48, 40)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(BIGGER))  # type: ignore[no-any-return]


def written(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    """Return the model as it is loaded from a folder that was described by the arguments of the smaller one."""
    shown = Preprocessing.of(model, input_size=(3, *BIGGER))
    write_student(model, folder, architecture=TINY[kind][0], model_args=arguments(kind), preprocessing=shown)
    return graftvit.load(folder)


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_windows_stay_as_timms_constructor_makes_them(kind: str) -> None:
    model = tiny(kind)
    resize(model, BIGGER)
    built: Any = tiny(kind, BIGGER)
    built.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(built))
    resize(model, (8, 8))  # smaller than a window
    resize(model, BIGGER)
    assert torch.equal(logits(model), logits(built)) or kind == "swin"  # whose tables were resampled


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["pvt", "svt", "swin", "swinv2"])
def test_a_resized_pyramid_is_built_again_from_its_folder(
    kind: str, plan: str | None, tmp_path: Path
) -> None:
    model = tiny(kind) if plan is None else convert(tiny(kind), plan, without=["bias"])
    resize(model, BIGGER)
    assert torch.equal(logits(written(model, kind, tmp_path / "folder")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_windows_that_timm_scaled_are_built_again(kind: str, plan: str | None, tmp_path: Path) -> None:
    model: Any = tiny(kind)
    model.set_input_size(img_size=BIGGER)
    assert model.layers[0].blocks[0].window_size == (4, 3)
    student = model if plan is None else convert(model, plan, without=["bias"])
    loaded = written(student, kind, tmp_path / "folder")
    assert torch.equal(logits(loaded), logits(student))
    again = written(loaded, kind, tmp_path / "again")
    assert torch.equal(logits(again), logits(student))


def test_images_of_the_teachers_own_size_are_not_said_to_be_resized() -> None:
    """PVTv2 takes images of any size, and this student those of its teacher."""
    norm = Normalization((0.5,), (0.5,))
    assert WholeInput(tiny("swin"), tiny("pvt"), norm, norm).describe() == []
    assert WholeInput(tiny("swin"), tiny("pvt", (40, 40)), norm, norm).describe() != []
