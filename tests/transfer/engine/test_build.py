"""What is checked before anything large is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_teacher
from graftvit.checkpoints.student import write_student
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import DataError, UnsupportedModelError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import build as building
from graftvit.transfer.engine import modes
from graftvit.transfer.methods.dual import DualViT
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, make_teacher
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


def run_from(source: str, **sections: Any) -> RunConfig:
    student = {"plan": "*: linear"} if sections.get("mode") == "align" else {}
    base = {"data": {"dataset": "digits", "workers": 0, "batch_size": 16}, "teacher": {"source": source}}
    return RunConfig.model_validate(
        {**base, **sections, "student": {**student, **sections.get("student", {})}}
    )


def small_teacher(folder: Path, pooling: str, classes: int = 10) -> str:
    arguments = {**ARGUMENTS, "num_classes": classes, "global_pool": pooling}
    torch.manual_seed(1)
    model = timm.create_model(ARCHITECTURE, **arguments)
    spec = Preprocessing.of(model, mean=(0.5,), std=(0.5,))
    write_student(model, folder, architecture=ARCHITECTURE, model_args=arguments, preprocessing=spec)
    return f"local-dir:{folder}"


STARTS = {
    "transfer": {"student": {"init": "teacher"}},
    "finetune": {"mode": "finetune"},
    "source": {"mode": "finetune", "teacher": {}, "student": {"init": "SOURCE"}},
    "scratch": {"mode": "scratch", "student": {"init": "teacher"}},
    "align": {"mode": "align"},
}


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("start", STARTS)
def test_a_student_is_built_as_the_model_whose_weights_it_starts_from(
    start: str, pooling: str, tmp_path: Path
) -> None:
    source = small_teacher(tmp_path / "t", pooling)
    sections = {**STARTS[start]}
    if start == "source":
        sections["student"] = {"init": source}
    parts = building.build(run_from(source, **sections))
    teacher = load_teacher(source).model.state_dict()
    found = parts.task.backbone.state_dict()
    assert parts.task.backbone.global_pool == pooling
    assert parts.spec.input_size == (1, 8, 8)
    assert set(teacher) <= set(found)
    assert all(torch.equal(found[name], values) for name, values in teacher.items())
    assert parts.warnings == []


def test_what_the_user_gives_stands_above_the_weights(tmp_path: Path) -> None:
    source = small_teacher(tmp_path / "t", "token")
    student = {"init": "teacher", "img_size": 16, "model_args": {"drop_rate": 0.5}, "global_pool": "avg"}
    plan = building.build(run_from(source, student=student), weights=False).plan
    assert plan.architecture == ARCHITECTURE
    assert plan.arguments["img_size"] == (16, 16)
    assert (plan.arguments["drop_rate"], plan.arguments["global_pool"]) == (0.5, "avg")
    assert plan.arguments["embed_dim"] == ARGUMENTS["embed_dim"]


@pytest.mark.parametrize(
    ("student", "classes", "warning"),
    [
        ({"global_pool": "avg"}, 10, "its final norm is fresh"),
        ({}, 7, "its head is fresh"),
        ({"model": ARCHITECTURE, "model_args": ARGUMENTS}, 10, ""),
    ],
)
def test_a_fresh_part_over_weights_that_bring_their_own_is_a_warning(
    student: dict[str, Any], classes: int, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = small_teacher(tmp_path / "t", "token", classes)
    config = run_from(source, output_dir=tmp_path / "run", student={"init": "teacher", **student})
    lines = [line.strip() for line in describe_plan(config).splitlines()]
    assert not caplog.records
    building.build(config)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if not warning:
        assert not logged
        assert not [line for line in lines if line.startswith("warning")]
        return
    (logged_line,) = logged
    assert logged_line.startswith(f"student: {warning}")
    assert [line for line in lines if line.startswith(f"warning: {warning}")]


def test_students_from_fresh_weights_are_pooled_by_avg() -> None:
    student = building.settle(RunConfig(), None).student
    assert (student.model, student.global_pool) == ("vit_base_patch16_224", "avg")
