"""What is checked before anything large is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.errors import DataError, UnsupportedModelError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import build as building
from graftvit.transfer.engine import modes
from graftvit.transfer.methods.dual import DualViT
from torch import Tensor


def test_a_missing_data_set_is_refused_before_the_teacher_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "load_pretrained", lambda *_, **__: pytest.fail("the teacher was loaded"))
    teacher = {"source": "vit_tiny_patch16_224.augreg_in21k"}
    with pytest.raises(DataError, match="/nowhere does not exist"):
        building.build(RunConfig(teacher=teacher, data={"data_path": "/nowhere"}))
    with pytest.raises(DataError, match=r"data\.data_path is not set"):
        building.build(RunConfig(teacher=teacher))


def test_all_processes_match_heads_on_the_same_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    size = {"img_size": 8, **small, "num_classes": 0}
    teacher = timm.create_model("vit_tiny_patch16_224", **size)
    write_student(
        teacher,
        tmp_path / "t",
        architecture="vit_tiny_patch16_224",
        model_args=size,
        preprocessing=Preprocessing.of(teacher, mean=(0.5,), std=(0.5,)),
    )
    config = RunConfig(
        teacher={"source": f"local-dir:{tmp_path / 't'}"},
        transfer={"heads": "match"},
        data={"dataset": "digits", "batch_size": 8, "workers": 0, "aa": "affine"},
        student={"model": "vit_tiny_patch16_224", "img_size": 8, "model_args": small},
    )
    shown: list[Tensor] = []
    build_dual = modes.build_dual

    def watched(*arguments: Any) -> DualViT:
        shown.append(arguments[-1])
        return build_dual(*arguments)

    monkeypatch.setattr(modes, "build_dual", watched)
    parts = [building.build(config, rank=rank, world_size=2) for rank in (0, 1)]
    own = [next(part.train_loader.epoch(0))[0] for part in parts]
    assert not own[0].equal(own[1])
    assert shown[0].equal(shown[1])


@pytest.mark.parametrize(
    "settings", [{"teacher": {"img_size": 2}}, {"mode": "scratch", "student": {"img_size": 2}}]
)
def test_images_smaller_than_a_patch_are_refused_in_one_sentence(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    source = {} if "mode" in settings else {"source": f"local-dir:{make_teacher(tmp_path / 't')}"}
    student = {"model": ARCHITECTURE, "model_args": ARGUMENTS, **settings.pop("student", {})}
    config = RunConfig(
        teacher={**source, **settings.pop("teacher", {})},
        student=student,
        data={"dataset": "digits"},
        **settings,
    )
    with pytest.raises(UnsupportedModelError, match="images of 2x2 have no whole patch of 4x4"):
        building.build(config, weights=False)
