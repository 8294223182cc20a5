"""Runs in which pyramids teach and learn: planned, trained, resumed, and loaded by timm alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import convert, plan_of
from graftvit.models.errors import TransferError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from support.models.pyramids import TINY, arguments, images, tiny
from support.runs.engine_runs import config, differences, make_teacher, records
from support.runs.scenarios import RunScenario
from torch import nn

NEEDS_FSDP = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU"
)

PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("swin", "pvt", {"method": "attention_output"}),
    ("svt", "swinv2", {"method": "block_output", "layers": "stage1>stage1,stage2>stage2"}),
    ("pvt", "svt", {"method": "distill", "layers": "0>1,1>3"}),
    ("swinv2", "swin", {"method": "feature", "tokens": "both"}),
]


def teacher_folder(folder: Path, kind: str, plan: str | None = None) -> Path:
    """Write a tiny pyramid with random weights; with a plan its conversion."""
    model = tiny(kind, num_classes=10)
    how = {"architecture": TINY[kind][0], "model_args": arguments(kind, num_classes=10)}
    shown = Preprocessing.of(model, input_size=(3, 32, 32))
    write_student(convert(model, plan) if plan else model, folder, **how, preprocessing=shown)
    return folder


def run_of(output_dir: Path, source: Path, student: dict[str, Any], **sections: Any) -> RunConfig:
    """Four steps on digits of 32x32, with another state after two."""
    short = {
        "optim": {"max_steps": 4, "warmup_epochs": 0},
        "data": {"batch_size": 8, "train_samples": 40},
        "engine": {"save_every": 2},
    }
    return config(output_dir, source, student={"img_size": 32, **student}, **{**short, **sections})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images((32, 32)))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student", "transfer"), PAIRS)
def test_a_pyramid_learns_from_another(
    teacher: str, student: str, transfer: dict[str, Any], tmp_path: Path
) -> None:
    source = teacher_folder(tmp_path / "teacher", teacher)
    of_student = {"model": TINY[student][0], "model_args": TINY[student][1]}
    runs = [run_of(tmp_path / name, source, of_student, transfer=transfer) for name in ("whole", "cut")]
    assert dry_run(runs[0], 1, here=True).footprint.student
    for run in runs:
        train(run)
    (tmp_path / "cut" / "checkpoints" / "last.safetensors").unlink()
    train(runs[1])
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    losses = [
        name for name in records(tmp_path / "whole")[-1] if name.startswith(("train_layer", "train_feature"))
    ]
    assert losses, "the record has the losses"
    folder = tmp_path / "whole" / "student"
    loaded = graftvit.load(folder)
    assert torch.equal(logits(timm.create_model(f"local-dir:{folder}", pretrained=True)), logits(loaded))


@pytest.mark.slow
@NEEDS_FSDP
@pytest.mark.parametrize(
    ("teacher", "student", "transfer"),
    [
        ("swin", "pvt", {"method": "attention_output", "layers": "stage2>stage2"}),
        ("pvt", "svt", {"method": "distill", "layers": "0>1,1>3"}),
    ],
)
def test_two_processes_give_the_numbers_of_one(
    run_scenario: RunScenario, tmp_path: Path, teacher: str, student: str, transfer: dict[str, Any]
) -> None:
    """Replicated and sharded."""
    report = run_scenario("engine_pyramid", tmp_path, teacher, student, transfer, {})
    assert report["ends"] == [[0], [0, 0], [0, 0]], report
    assert max(report["gaps"]) < 1e-4, report


@pytest.mark.slow
@NEEDS_FSDP
@pytest.mark.parametrize(
    ("kind", "plan", "without"),
    [
        ("swin", "0: none; stage1.1: softmax; stage2: linear", ["bias"]),
        ("pvt", "0: none; stage2.0: softmax; stage2.1: linear", []),
    ],
)
def test_two_processes_train_a_converted_pyramid_to_the_numbers_of_one(
    run_scenario: RunScenario, tmp_path: Path, kind: str, plan: str, without: list[str]
) -> None:
    """Replicated and sharded; the student of each run is loaded."""
    converted = {"plan": plan, "init": "teacher", **({"without": without} if without else {})}
    transfer = {"method": "attention_output", "layers": "stage2>stage2"}
    report = run_scenario("engine_pyramid", tmp_path, kind, kind, transfer, converted)
    assert report["ends"] == [[0], [0, 0], [0, 0]], report
    assert max(report["gaps"]) < 1e-4, report
    assert report["plans"] == [str(plan_of(convert(tiny(kind), plan, without=without)))] * 3


@pytest.mark.slow
def test_windows_teach_a_student_that_attends_to_all_tokens(tmp_path: Path) -> None:
    source = teacher_folder(tmp_path / "teacher", "swin")
    plan = "stage1: softmax"
    student = {"model": TINY["swin"][0], "model_args": TINY["swin"][1], "plan": plan, "init": "teacher"}
    run = run_of(tmp_path / "run", source, student, transfer={"method": "distill", "layers": "stage1"})
    train(run)
    loaded = graftvit.load(tmp_path / "run" / "student")
    assert plan_of(loaded) == plan_of(convert(tiny("swin"), plan))


def test_the_plan_of_a_run_says_how_the_stages_differ(tmp_path: Path) -> None:
    source = teacher_folder(tmp_path / "teacher", "swin")
    student = {"model": TINY["pvt"][0], "model_args": TINY["pvt"][1]}
    run = run_of(tmp_path / "run", source, student, transfer={"method": "attention_output"})
    task: Any = build(run, weights=False).task
    said = task.dual.describe()
    assert "layers (teacher>student): 1>0, 2>1, 3>2" in said
    assert "3x3 windows or 3x3 shifted windows, 3x3 windows or 3x3 shifted windows  keys of 2x2, all" in said


@pytest.mark.parametrize("method", ["copy", "copy_v"])
def test_a_student_that_copies_a_pyramid_is_refused_before_it_runs(method: str, tmp_path: Path) -> None:
    source = teacher_folder(tmp_path / "teacher", "pvt")
    student = {"model": TINY["pvt"][0], "model_args": TINY["pvt"][1]}
    run = run_of(tmp_path / "run", source, student, transfer={"method": method})
    for weights in (False, True):
        with pytest.raises(TransferError, match="PyramidVisionTransformerV2 is a pyramid; use distill"):
            build(run, weights=weights)


@pytest.mark.slow
def test_a_plain_teacher_teaches_a_stage(tmp_path: Path) -> None:
    source = make_teacher(tmp_path / "teacher")
    student = {"model": TINY["svt"][0], "model_args": {**TINY["svt"][1], "in_chans": 1}}
    run = run_of(
        tmp_path / "run",
        source,
        student,
        teacher={"source": f"local-dir:{source}", "img_size": 32},
        transfer={"method": "attention_output", "layers": "stage1>stage1"},
    )
    assert train(run).finished
