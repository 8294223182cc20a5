"""Runs of detectors and segmenters: what a step learns, what is measured, how they resume, and what they leave."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.dense_models import load_dense, save_dense
from graftvit.checkpoints.state import read_state
from graftvit.models.dense import DESIGNS, DETECTION, Kind
from graftvit.models.dense.dense_model import create_dense
from graftvit.models.errors import ConfigError, DataError, TransferError
from graftvit.models.families import create_timm_model
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from support.runs.dense_runs import PVT, VIT, run, small_ade20k, small_coco
from support.runs.engine_runs import records, resume_cut


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_ade20k(tmp_path_factory.mktemp("ade20k"))


@pytest.mark.parametrize("head", get_args(Kind))
def test_a_run_learns_measures_resumes_and_leaves_its_model(
    tmp_path: Path, coco: Path, ade20k: Path, head: Kind
) -> None:
    images = coco if DESIGNS[head].task == DETECTION else ade20k
    folder = resume_cut(lambda folder: run(folder, images, head), tmp_path)
    last = records(folder)[-1]
    assert 0 <= last[f"test_{DESIGNS[head].best}"] <= 1
    assert 0 <= last[f"test_ema_{DESIGNS[head].best}"] <= 1
    assert math.isfinite(last["train_loss"])
    model = load_dense(folder)
    state = read_state(folder / "checkpoints" / "last.safetensors").tensors
    own = {f"student.{name}": value for name, value in model.state_dict().items()}
    assert own.keys() == {name for name in state if name.startswith("student.")}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    body = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True, features_only=True)
    image = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(model.eval().backbone(image), body.eval()(image), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert len(model([torch.rand(3, 50, 70)])) == 1


def detector(folder: Path, coco: Path, model: str, arguments: dict[str, Any]) -> Path:
    student = {"model": model, "model_args": arguments, "drop_path": 0.0}
    return train(run(folder, coco, student=student, optim={"ema": None})).output_dir


def teacher_of(folder: Path) -> dict[str, Any]:
    return {"source": str(folder)}


def test_a_detector_is_converted_aligned_and_trained_on(tmp_path: Path, coco: Path) -> None:
    """Neck and head are the old ones; teacher and student see one batch; the steps of alignment need no labels."""
    old = detector(tmp_path / "old", coco, "vit_tiny_patch16_224", VIT)
    student = {"model": "auto", "model_args": {}, "drop_path": 0.0, "init": "teacher", "plan": "*: linear"}
    more = {"teacher": teacher_of(old), "student": student, "optim": {"ema": None}}
    dense = {"source": str(old)}
    align = run(tmp_path / "align", coco, mode="align", dense=dense, **more)
    result = train(align)
    assert result.finished
    assert records(tmp_path / "align")[-1]["train_loss"] > 0
    student["init"] = str(tmp_path / "align")
    transfer = {"method": "attention_output", "weight": 2.0}
    tuned = run(
        tmp_path / "tuned", coco, mode="transfer", dense={**dense, "frozen": True}, transfer=transfer, **more
    )
    train(tuned)
    before, after = load_dense(old).state_dict(), load_dense(tmp_path / "tuned").state_dict()
    same = {name for name in before if not name.startswith("backbone.")}
    assert same
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert records(tmp_path / "tuned")[-1]["train_transfer"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_detector_that_is_killed_four_times_leaves_no_trace(
    run_scenario: Any, tmp_path: Path, ranks: int
) -> None:
    report = run_scenario("engine_killer", "kill", tmp_path, ranks, "dense")
    assert report["disturbed"] == 4, report
    assert report["last"] == [0] * ranks, report
    assert report["differences"] == []


def test_layers_are_fitted_on_images_padded_to_the_patches(tmp_path: Path, coco: Path) -> None:
    size = {**VIT, "patch_size": 14, "img_size": 56, "dynamic_img_size": True}
    teacher = graftvit.save(timm.create_model("vit_tiny_patch16_224", **size), tmp_path / "teacher")
    student = {"model": "auto", "model_args": {}, "drop_path": 0.0, "plan": "*: hedgehog", "calibrate": 2}
    settings = run(
        tmp_path / "run", coco, mode="align", teacher=teacher_of(teacher), student=student,
        optim={"ema": None, "epochs": 1},
    )  # fmt: skip
    assert dry_run(settings, 1, here=True).footprint.activations > 0
    assert train(settings).finished


def test_a_dry_run_builds_it_without_weights(tmp_path: Path, coco: Path) -> None:
    found = dry_run(run(tmp_path, coco), 1, here=True)
    assert found.footprint.activations > 0
    assert found.parts.choice is not None
    assert found.parts.choice.key == "box_ap"


TAUGHT: dict[str, Any] = {"mode": "transfer", "teacher": {"source": "no-such"}}


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"engine": {"metric": "top1"}}, ConfigError),
        ({"mode": "pretrain"}, ConfigError),
        ({"data": {"dataset": "digits", "data_path": None}}, DataError),
        ({"data": {"data_path": "/nowhere"}}, DataError),
        ({"dense": {"norms": [7]}}, ConfigError),
        ({"dense": {"head": "fcos", "anchor_scale": 4.0}}, ConfigError),
        ({"dense": {"head": None}}, ConfigError),
        ({"dense": {"head": "upernet"}, "data": {"batch_size": 1}}, ConfigError),
        (
            {"mode": "transfer", "teacher": {"source": "no-such"}, "transfer": {"method": "feature"}},
            TransferError,
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, coco: Path, sections: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        train(run(tmp_path / "out", coco, **sections))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_head_is_built_as_that_of_its_source(tmp_path: Path, coco: Path) -> None:
    body = create_timm_model("pvt_v2_b0", **PVT)
    source = save_dense(
        create_dense("mask_rcnn", body, 3, width=24, norms=[1], anchor_scale=2, samples=32),
        tmp_path / "source",
    )
    dense = {"width": None, "source": str(source)}
    found = load_dense(
        train(run(tmp_path / "run", coco, "mask_rcnn", dense=dense, optim={"epochs": 1})).output_dir
    )
    built = {name: found.settings[name] for name in ("width", "norms", "anchor_scale", "samples")}
    assert built == {"width": 24, "norms": [1], "anchor_scale": 2, "samples": 32}
    for name, value in {"width": 16, "norms": [0, 1]}.items():
        with pytest.raises(ConfigError, match="does not fit"):
            train(run(tmp_path / name, coco, "mask_rcnn", dense=dense | {name: value}))


def test_the_head_of_other_classes_stays_fresh_and_one_of_another_width_is_refused(
    tmp_path: Path, coco: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for width in (16, 24):
        other = create_dense("retinanet", create_timm_model("pvt_v2_b0", **PVT), 5, width=width)
        source = save_dense(other, tmp_path / str(width))
        settings = run(tmp_path / f"of_{width}", coco, dense={"source": str(source)}, optim={"epochs": 1})
        if width == settings.dense.width:
            neck = load_dense(train(settings).output_dir).neck
            assert neck.state_dict().keys() == other.neck.state_dict().keys()
            assert "cls_logits" in caplog.text
        else:
            with pytest.raises(ConfigError):
                train(settings)
