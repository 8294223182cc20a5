"""Runs that learn without labels ask for none: flat folders, no class count, no validation split, the head stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.state import read_state
from graftvit.checkpoints.student import write_student
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.build import build
from PIL import Image
from support.files.image_folders import flat_folder
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, records, tiny_vit

SHORT = [
    "batch_size=8", "workers=0", "aa=none", "hflip=0", "max_steps=3", "warmup_epochs=0", "device=cpu",
    "trackers=none", "progress=false", "blr=0.05", "mixup=0.5",
]  # fmt: skip
FRESH = [
    f"student.model={ARCHITECTURE}", "student.img_size=8", "student.model_args.patch_size=4",
    "student.model_args.in_chans=1", "student.model_args.embed_dim=16", "student.model_args.depth=2",
    "student.model_args.num_heads=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "encoder"
    torch.manual_seed(5)
    arguments = {**ARGUMENTS, "num_classes": 0}
    model = tiny_vit(num_classes=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "qkv.weight" in name else 1)  # attention that is far from uniform
    how = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    write_student(model, folder, architecture=ARCHITECTURE, model_args=arguments, preprocessing=how)
    return folder


def run(folder: Path, *words: str, data: Path | None) -> Path:
    path = [] if data is None else [f"data_path={data}"]
    assert main(["train", *SHORT, *words, *path, f"output_dir={folder}"]) == 0
    return folder


def align(teacher: Path, *words: str) -> list[str]:
    return [
        "mode=align",
        f"student.model=local-dir:{teacher}",
        f"teacher=local-dir:{teacher}",
        "plan=*: linear",
        *words,
    ]


def student(folder: Path) -> Any:
    return graftvit.load(str(folder / "student"))


@pytest.mark.parametrize("start", ["whole", "teacher", "file"])
def test_a_head_that_came_with_the_weights_stays(start: str, teacher: Path, tmp_path: Path) -> None:
    data = flat_folder(tmp_path / "images", validation=6)
    whole = [f"student.model=local-dir:{teacher}"]
    fresh = [*FRESH, "global_pool=token"]
    inits = {"whole": whole, "teacher": fresh, "file": [*fresh, f"student.init=local-dir:{teacher}"]}
    words = [
        "mode=align",
        f"teacher=local-dir:{teacher}",
        "student.plan=*: linear",
        *inits[start],
    ]
    made = run(tmp_path / "run", *words, data=data)
    original, aligned = graftvit.load(str(teacher)), student(made)
    assert aligned.num_classes == 10
    assert torch.equal(original.head.weight, aligned.head.weight)
    assert not any("top1" in name for record in records(made) for name in record)


def test_a_student_without_a_head_gets_none(headless: Path, tmp_path: Path) -> None:
    """A random head that nothing trains would be a claim."""
    data = flat_folder(tmp_path / "images")
    words = [
        *FRESH,
        f"teacher=local-dir:{headless}",
        "method=block_output",
        "task_weight=0",
        "evaluate_start=true",
    ]
    made = run(tmp_path / "run", *words, data=data)
    assert student(made).num_classes == 0
    assert not any(name.startswith("test_") for record in records(made) for name in record)
    assert not (made / "checkpoints" / "best.safetensors").exists(), (
        "without test images the last state counts"
    )


def test_the_head_of_logits_is_the_teachers(teacher: Path, tmp_path: Path) -> None:
    data = flat_folder(tmp_path / "images", validation=6)
    words = [*FRESH, f"teacher=local-dir:{teacher}", "method=logits", "task_weight=0"]
    made = run(tmp_path / "run", *words, data=data)
    assert student(made).num_classes == 10
    assert last(made)["test_objective"] > 0


def last(folder: Path) -> dict[str, Any]:
    return [record for record in records(folder) if "n_parameters" in record][-1]


@pytest.mark.parametrize("method", ["align", "block_output", "distill"])
def test_held_out_images_measure_how_near_the_teacher_is(method: str, headless: Path, tmp_path: Path) -> None:
    data = flat_folder(tmp_path / "images", validation=6)
    words = [f"teacher=local-dir:{headless}", "engine.evaluate_start=true", "optim.ema=0.5"]
    if method == "align":
        words += align(headless)
    else:
        words += [*FRESH, "global_pool=token", f"transfer.method={method}", "task_weight=0"]
    made = run(tmp_path / "run", *words, data=data)
    record, start = last(made), records(made)[0]
    names = {name for name in record if name.startswith("test_")}
    position = read_state(made / "checkpoints" / "best.safetensors").meta["position"]
    if method == "distill":  # its features are not the teacher's, only its maps
        assert names == {"test_objective", "test_ema_objective"}
        assert position["best_metric"] == "objective"
        assert position["best"] == record["test_ema_objective"]
        return
    parts = [
        f"{each}{layer}"
        for each in ("relative_error", "cosine", "cka")
        for layer in ("", "_layer00", "_layer01")
    ]
    assert names == {"test_samples", *(f"test_{prefix}{part}" for prefix in ("", "ema_") for part in parts)}
    assert record["test_relative_error"] < start["test_relative_error"]
    assert position["best_metric"] == "relative_error"
    assert position["best"] == record["test_ema_relative_error"]


def test_the_logged_distance_is_that_of_the_student_that_is_left(headless: Path, tmp_path: Path) -> None:
    data = flat_folder(tmp_path / "images", validation=6)
    made = run(tmp_path / "run", *align(headless), data=data)
    config = DataConfig(data_path=str(data), workers=0, num_classes=None)
    loader = create_eval_loader(config, Preprocessing((1, 8, 8), (0.5,), (0.5,)), labels=False)
    images = torch.cat([images[valid] for images, _, valid in loader])
    with torch.no_grad():
        ours, theirs = student(made).eval()(images), graftvit.load(str(headless)).eval()(images)
    error = float((ours - theirs).norm() / theirs.norm())
    assert last(made)["test_relative_error"] == pytest.approx(error, rel=1e-5)


def test_pretraining_needs_no_classes(tmp_path: Path) -> None:
    words = [
        "mode=pretrain",
        *FRESH,
        "decoder_dim=8",
        "decoder_depth=1",
        "decoder_heads=2",
        "train_samples=17",
    ]
    made = run(tmp_path / "run", *words, data=flat_folder(tmp_path / "images"))
    assert student(made).num_classes == 0
    measured = run(
        tmp_path / "measured", *words, "metric=loss", data=flat_folder(tmp_path / "split", validation=5)
    )
    assert last(measured)["test_objective"] > 0


def test_a_set_without_labels_by_index_works(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlabeled:
        targets = None
        class_names = None

        def __len__(self) -> int:
            return 30

        def read(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (9, 9), index * 8), index % 7

        def path(self, index: int) -> str:
            return f"image {index}"

    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Unlabeled())
    made = run(tmp_path / "run", *align(teacher), "dataset=digits", "train_samples=20", data=None)
    assert student(made).num_classes == 10
    assert last(made)["test_relative_error"] > 0


@pytest.mark.parametrize("mode", ["finetune", "scratch", "transfer"])
def test_what_learns_from_labels_says_that_they_are_missing(
    mode: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = flat_folder(tmp_path / "images", validation=3)
    words = ["train", *SHORT, *FRESH, f"mode={mode}", f"data_path={data}", f"output_dir={tmp_path / 'run'}"]
    words += [] if mode == "scratch" else [f"teacher=local-dir:{teacher}"]
    assert main(words) == 2
    assert "has no class folders" in capsys.readouterr().err


def test_a_split_that_is_named_must_be_there(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = flat_folder(tmp_path / "images")
    words = ["train", *SHORT, *align(teacher), f"data_path={data}", f"output_dir={tmp_path / 'run'}"]
    assert main([*words, "val_split=holdout"]) == 2
    assert "data.val_split=holdout is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["align", "block_output", "pretrain", "logits"])
def test_the_dry_run_plans_what_the_run_does(case: str, teacher: Path, tmp_path: Path) -> None:
    source = f"teacher=local-dir:{teacher}"
    words = {
        "align": align(teacher),
        "block_output": [*FRESH, source, "method=block_output", "task_weight=0"],
        "pretrain": ["mode=pretrain", *FRESH, "decoder_dim=8", "decoder_depth=1", "decoder_heads=2"],
        "logits": [*FRESH, source, "method=logits", "task_weight=0"],
    }[case]
    data = flat_folder(tmp_path / "images")
    config = load_config(None, [*SHORT, *words, f"data_path={data}", f"output_dir={tmp_path / 'run'}"])
    plan, parts = describe_plan(config), build(config)
    trained = sum(p.numel() for p in parts.task.trainable.parameters() if p.requires_grad)
    classes = parts.plan.arguments["num_classes"]
    assert f"{trained:,} of " in plan
    assert (f"{classes} classes" if classes else "no head") in plan
    assert "24 training images, no labels" in plan
    assert "the last state: nothing is evaluated" in plan
    nowhere = load_config(None, [*SHORT, *words, "data_path=/nowhere"])
    assert "not read" in describe_plan(nowhere)


def test_copying_without_labels_is_refused_by_the_dry_run_too(teacher: Path, tmp_path: Path) -> None:
    words = [*SHORT, *FRESH, f"teacher=local-dir:{teacher}", "method=copy", "task_weight=0"]
    config = load_config(None, [*words, f"data_path={flat_folder(tmp_path)}"])
    for check in (build, describe_plan):
        with pytest.raises(ConfigError, match="leaves nothing to learn"):
            check(config)
