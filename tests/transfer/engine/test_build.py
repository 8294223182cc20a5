"""What a run is built of, and what is checked before anything large is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.student import write_student
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError, DataError, GraftError, TransferError, UnsupportedModelError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import build as building
from graftvit.transfer.engine import modes
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.resume_check import check_same_classes, check_same_run, settings
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from support.files.image_folders import class_folder
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_convnext, make_teacher, records
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
    data = {"dataset": "digits", "batch_size": 8, "workers": 0, "aa": "affine"}
    student = {"model": ARCHITECTURE, "model_args": ARGUMENTS}
    source = {"source": f"local-dir:{make_teacher(tmp_path / 't')}"}
    run = RunConfig(teacher=source, transfer={"heads": "match"}, data=data, student=student)
    shown: list[Tensor] = []
    build_dual = modes.build_dual

    def watched(*arguments: Any) -> DualViT:
        shown.append(arguments[-1])
        return build_dual(*arguments)

    monkeypatch.setattr(modes, "build_dual", watched)
    parts = [building.build(run, rank=rank, world_size=2) for rank in (0, 1)]
    own = [next(part.train_loader.epoch(0))[0] for part in parts]
    assert not own[0].equal(own[1])
    assert shown[0].equal(shown[1])


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_images_smaller_than_a_patch_are_refused_in_one_sentence(section: str, tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "t") if section == "teacher" else None
    run = config(tmp_path / "run", source)
    small = getattr(run, section).model_copy(update={"img_size": (2, 2)})
    with pytest.raises(UnsupportedModelError, match="images of 2x2 have no whole patch of 4x4"):
        building.build(run.model_copy(update={section: small}), weights=False)


@pytest.mark.parametrize("value", [None, 1e-5, 1.0])
def test_a_fresh_student_is_warned_of_a_small_layer_scale(tmp_path: Path, value: float | None) -> None:
    data = {"dataset": "digits", "batch_size": 8, "workers": 0}
    student = {"model": ARCHITECTURE, "model_args": {**ARGUMENTS, "init_values": value}}
    run = RunConfig(mode="scratch", data=data, student=student, output_dir=tmp_path)
    found = dry_run(run, 1, here=True)
    assert ["LayerScale" in each for each in found.parts.warnings] == [True] * (value == 1e-5)
    assert ("init_values=1.0" in describe_plan(run)) == (value == 1e-5)


def run_from(source: str, **sections: Any) -> RunConfig:
    student = {"plan": "*: linear"} if sections.get("mode") == "align" else {}
    base = {"data": {"dataset": "digits", "workers": 0, "batch_size": 16}, "teacher": {"source": source}}
    return RunConfig.model_validate({**base, **sections, "student": student | sections.get("student", {})})


def small_teacher(folder: Path, pooling: str, classes: int = 10) -> str:
    arguments = {**ARGUMENTS, "num_classes": classes, "global_pool": pooling}
    torch.manual_seed(1)
    model = timm.create_model(ARCHITECTURE, **arguments)
    spec = Preprocessing.of(model, mean=(0.5,), std=(0.5,))
    write_student(model, folder, architecture=ARCHITECTURE, model_args=arguments, preprocessing=spec)
    return f"local-dir:{folder}"


@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("start", ["transfer", "finetune", "source", "scratch", "align"])
def test_a_student_is_built_as_the_model_whose_weights_it_starts_from(
    start: str, pooling: str, tmp_path: Path
) -> None:
    source = small_teacher(tmp_path / "t", pooling)
    sections: dict[str, Any] = {
        "source": {"mode": "finetune", "teacher": {}, "student": {"init": source}},
        "transfer": {"student": {"init": "teacher"}},
        "scratch": {"mode": "scratch", "student": {"init": "teacher"}},
    }.get(start, {"mode": start})
    parts = building.build(run_from(source, **sections))
    teacher = load_pretrained(source).model.state_dict()
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
    wanted = {
        "img_size": (16, 16),
        "drop_rate": 0.5,
        "global_pool": "avg",
        "embed_dim": ARGUMENTS["embed_dim"],
    }
    assert plan.architecture == ARCHITECTURE
    assert {name: plan.arguments[name] for name in wanted} == wanted
    fresh = building.settle(RunConfig(), None).student
    assert (fresh.model, fresh.global_pool) == ("vit_base_patch16_224", "avg")


@pytest.mark.parametrize(
    ("student", "classes", "warnings"),
    [
        ({"global_pool": "avg"}, 10, ["its final norm is fresh"]),
        ({}, 7, ["its head is fresh"]),
        ({"model": ARCHITECTURE, "model_args": ARGUMENTS}, 10, []),
    ],
)
def test_a_fresh_part_over_weights_that_bring_their_own_is_a_warning(
    student: dict[str, Any],
    classes: int,
    warnings: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = small_teacher(tmp_path / "t", "token", classes)
    config = run_from(source, output_dir=tmp_path / "run", student={"init": "teacher", **student})
    shown = [line.strip() for line in describe_plan(config).splitlines() if "warning: " in line]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    building.build(config)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for lines, start in ((shown, "warning: "), (logged, "student: ")):
        assert len(lines) == len(warnings)
        assert all(line.startswith(f"{start}{each}") for line, each in zip(lines, warnings, strict=True))


NAMES = {"same": ["bee", "cat"], "swapped": ["cat", "bee"], "other": ["ant", "cat"], "none": None}


def named_run(tmp_path: Path, kind: str, **sections: Any) -> Any:
    """A run on images of bees and cats with a teacher whose classes are called so, in another order, or otherwise."""
    root, folder = tmp_path / "set", make_teacher(tmp_path / f"teacher-{kind}", classes=2)
    if not root.exists():
        class_folder(root, ("bee", "cat"))
    described = json.loads((folder / "config.json").read_text())
    labels = {"label_names": NAMES[kind]} if NAMES[kind] else {}
    (folder / "config.json").write_text(json.dumps(described | labels))
    data = {"dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 8, "mixup": 0.0}
    return config(tmp_path / kind, folder, **{"data": data, "optim": {"epochs": 1, "ema": None}, **sections})


def test_the_teachers_accuracy_goes_by_name(tmp_path: Path) -> None:
    """A teacher whose classes are in another order had the accuracy of one that takes each for the other."""
    kinds = ("same", "swapped", "other")
    runs = [named_run(tmp_path, kind, engine={"evaluate_teacher": True}) for kind in kinds]
    same, swapped, other = (train(run).metrics.get("teacher_top1") for run in runs)
    assert same is not None
    assert swapped == pytest.approx(100 - same)
    assert other is None


def test_logits_of_other_classes_are_refused(tmp_path: Path) -> None:
    transfer = {"method": "logits"}
    for kind in ("swapped", "other"):
        with pytest.raises(TransferError, match=r"transfer\.method=logits.*class 0"):
            building.build(named_run(tmp_path, kind, transfer=transfer))
    building.build(named_run(tmp_path, "same", transfer=transfer))
    plan = building.build(named_run(tmp_path, "none", transfer=transfer)).plan
    assert plan.label_names == ("bee", "cat")
    check_same_classes({"student": {}}, ("a",), Path("run"))
    check_same_classes({"student": {"label_names": ["a"]}}, None, Path("run"))
    check_same_classes({"student": {"label_names": ["a", "b"]}}, ("a", "b"), Path("run"))
    with pytest.raises(ConfigError, match=r"3 classes.*there are 2.*'b' and 'c'"):
        check_same_classes({"student": {"label_names": ["a", "b", "c"]}}, ("a", "c"), Path("run"))


def test_a_head_that_is_kept_keeps_its_names(tmp_path: Path) -> None:
    """Without labels the student learns the teacher's classes, and is scored by these where the images have them."""
    sections, scores = {"transfer": {"method": "logits", "task_weight": 0.0}}, {}
    for kind in ("same", "swapped", "other"):
        run = named_run(tmp_path, kind, **sections)
        built = building.build(run)
        assert built.plan.label_names == tuple(NAMES[kind])
        assert built.classified == (kind != "other")
        if built.classified:
            train(run)
            scores[kind] = records(tmp_path / kind)[-1]["test_top1"]
    assert scores["swapped"] == pytest.approx(100 - scores["same"])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    five = make_teacher(folder / "five", classes=5)
    made = {"vit": make_teacher(folder / "vit"), "convnext": make_convnext(folder / "convnext"), "five": five}
    return {name: f"local-dir:{path}" for name, path in made.items()}


def run_with(
    folder: Path, teachers: dict[str, str], names: str, transfer: dict[str, Any], **of_c: Any
) -> RunConfig:
    """A run whose section `teacher` has the first of two names, or none, and whose teacher `c` the second."""
    teacher, _, other = names.partition(", ")
    sections: dict[str, Any] = {"mode": "transfer", "transfer": transfer}
    if teacher != "none":
        sections["teacher"] = {"source": teachers[teacher]}
    if other:
        sections["teachers"] = {"c": {"source": teachers[other], **of_c}}
    return config(folder, **sections)


OF_C = {"losses": [{"method": "distill", "teacher": "c"}]}
LAYERS = r"method=distill reads the layers of its teacher, and ConvNeXt is not a supported model.*feature and logits"
DISTILL, LOGITS_OF_C = {"method": "distill"}, {"method": "logits", "teacher": "c"}


@pytest.mark.parametrize(
    ("names", "transfer", "message"),
    [
        ("convnext", DISTILL, rf"^transfer.{LAYERS}"),
        ("vit, convnext", OF_C, rf"^transfer.losses\[0\].{LAYERS}"),  # and not that nobody uses the vit
        ("none, convnext", OF_C, rf"^transfer.losses\[0\].{LAYERS}"),
        ("vit, vit", OF_C, "no entry of transfer.losses learns from the section teacher"),
        ("none, vit", OF_C, "no entry of transfer.losses learns from the section teacher"),
        ("vit, convnext", {"losses": [DISTILL]}, "teachers.c teaches nothing"),
        ("vit, five", {"losses": [DISTILL, LOGITS_OF_C]}, r"losses\[1\].method=logits .* the teacher has 5"),
        (
            "vit",
            {"losses": [DISTILL, {**DISTILL, "layers": 9}]},
            r"losses\[1\].layers='9' of the student: there is no layer 9",
        ),
        ("vit", {"weight": 0, "task_weight": 0}, "task_weight=0 leaves nothing to learn.*weight of each"),
        (
            "vit",
            {"losses": [{"method": "copy"}, {"method": "feature", "weight": 0}], "task_weight": 0},
            "leaves nothing to learn",
        ),
    ],
)
def test_the_real_mistake_is_named(
    names: str, transfer: dict[str, Any], message: str, teachers: dict[str, str], tmp_path: Path
) -> None:
    run = run_with(tmp_path / "run", teachers, names, transfer)
    for start in (lambda: dry_run(run, 1, here=True), lambda: train(run)):
        with pytest.raises(GraftError, match=message):
            start()
    mode_of(
        run_with(tmp_path / "run", teachers, "vit", {"weight": 0})
    ).check()  # beside labels it only measures


def test_a_setting_of_a_further_teacher_is_named_by_its_key(teachers: dict[str, str], tmp_path: Path) -> None:
    losses = {"losses": [DISTILL, {**DISTILL, "teacher": "c"}]}
    run = run_with(tmp_path / "run", teachers, "vit, vit", losses, img_size=16)
    with pytest.raises(GraftError, match=r"teachers.c.img_size.*transfer.losses\[1\].interpolate_grid=true"):
        dry_run(run, 1, here=True)


FEATURE = {"method": "feature"}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{**DISTILL, "weight": 2.0}, FEATURE], r"^transfer.losses\[0\].weight=2.0, .* was started with 3.0"),
        ([FEATURE, DISTILL], r"^transfer.losses\[0\].method='feature', but"),
        ([DISTILL], r"^transfer.losses='1 loss', but the run in .* was started with '2 losses'"),
        ([], r"^transfer.losses=.*, but the run in .* was started with '2 losses'"),
    ],
)
def test_a_run_is_not_resumed_with_other_losses(
    losses: list[dict[str, Any]], message: str, teachers: dict[str, str], tmp_path: Path
) -> None:
    first = run_with(tmp_path / "run", teachers, "vit", {"losses": [DISTILL, FEATURE]})
    saved = {"config": settings(first), "origins": {}}
    check_same_run(saved, first)
    with pytest.raises(GraftError, match=message):
        check_same_run(saved, run_with(tmp_path / "run", teachers, "vit", {"losses": losses}))
