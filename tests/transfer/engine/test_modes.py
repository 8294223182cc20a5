"""What a step computes in each mode, and runs without labels, which ask for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
import torch.nn.functional as F
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.state import read_state
from graftvit.launch.cli import main
from graftvit.launch.load_config import load_config
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError
from graftvit.models.mae import MaskedAutoencoder
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.data.loaders import create_eval_loader
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.tasks import ClassificationTask, PretrainTask, TransferTask, classification_loss
from graftvit.transfer.methods.dual import DualViT
from PIL import Image
from support.files.image_folders import flat_folder
from support.runs.engine_runs import ARCHITECTURE, make_teacher, records, tiny_vit
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_class_indices_get_label_smoothing_and_probabilities_have_it(smoothing: float) -> None:
    logits, targets = torch.randn(6, 10), torch.randint(10, (6,))
    wanted = LabelSmoothingCrossEntropy(smoothing)(logits, targets)
    torch.testing.assert_close(classification_loss(logits, targets, smoothing), wanted)
    soft = torch.rand(6, 10).softmax(-1)
    wanted = SoftTargetCrossEntropy()(logits, soft)
    torch.testing.assert_close(classification_loss(logits, soft, smoothing), wanted)
    assert classification_loss(logits.bfloat16(), targets, smoothing).dtype == torch.float32


def test_transfer_adds_the_weighted_loss_and_names_its_parts() -> None:
    torch.manual_seed(0)
    task = TransferTask(DualViT(tiny_vit(), tiny_vit(), "distill", weight=2.0), smoothing=0.1)
    images, targets = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    losses = task(images, targets)
    assert list(losses) == ["loss", "task", "transfer", "layer00", "layer01"]
    torch.testing.assert_close(losses["transfer"], 2 * (losses["layer00"] + losses["layer01"]))
    torch.testing.assert_close(losses["loss"], losses["task"] + losses["transfer"])
    wanted = F.cross_entropy(task.predict(images), targets, label_smoothing=0.1)
    torch.testing.assert_close(losses["task"], wanted)


def test_copying_has_no_transfer_loss_and_predicts_through_the_teacher() -> None:
    torch.manual_seed(0)
    dual = DualViT(tiny_vit(), tiny_vit(), "copy")
    task = TransferTask(dual, smoothing=0.0).eval()
    images = torch.randn(4, 1, 8, 8)
    assert list(task(images, torch.zeros(4, dtype=torch.long))) == ["loss", "task"]
    before = task.predict(images)
    with torch.no_grad():
        for name, parameter in dual.teacher.named_parameters():
            if "qkv" in name:
                parameter.mul_(50)
    assert not torch.equal(task.predict(images), before)


def test_the_teacher_is_no_part_of_any_task() -> None:
    student = tiny_vit()
    task = TransferTask(DualViT(tiny_vit(depth=4), student, "distill", layers="first:2"), smoothing=0.0)
    assert task.trainable is student
    assert {name.removeprefix("dual.student.") for name in task.state_dict()} == set(student.state_dict())
    task.train()
    assert not task.dual.teacher.training


def test_the_weights_of_every_task_are_named_after_the_student() -> None:
    encoder = tiny_vit(num_classes=0, global_pool="token")
    pretrain = PretrainTask(MaskedAutoencoder(encoder, decoder_dim=8, decoder_depth=1, decoder_heads=2))
    transfer = TransferTask(DualViT(tiny_vit(), tiny_vit()), 0)
    for task in (ClassificationTask(tiny_vit(), 0.0), pretrain, transfer):
        assert all(name.startswith("student.") for name in task.saved.state_dict())
        assert len(task.shard_units) == 2
    assert pretrain(torch.randn(4, 1, 8, 8), torch.zeros(4)).keys() == {"loss"}


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
    return make_teacher(tmp_path_factory.mktemp("teachers") / "encoder", classes=0)


def run(folder: Path, *words: str, data: Path | None) -> Path:
    path = [] if data is None else [f"data_path={data}"]
    assert main(["train", *SHORT, *words, *path, f"output_dir={folder}"]) == 0
    return folder


def student(folder: Path) -> Any:
    return graftvit.load(str(folder / "student"))


def last(folder: Path) -> dict[str, Any]:
    return [record for record in records(folder) if "n_parameters" in record][-1]


def align(teacher: Path, *words: str) -> list[str]:
    source = f"local-dir:{teacher}"
    return ["mode=align", f"student.model={source}", f"teacher={source}", "plan=*: linear", *words]


@pytest.mark.parametrize("start", ["whole", "teacher", "file"])
def test_a_head_that_came_with_the_weights_stays(start: str, teacher: Path, tmp_path: Path) -> None:
    source, fresh = f"local-dir:{teacher}", [*FRESH, "global_pool=token"]
    inits = {
        "whole": [f"student.model={source}"],
        "teacher": fresh,
        "file": [*fresh, f"student.init={source}"],
    }
    words = ["mode=align", f"teacher={source}", "student.plan=*: linear", *inits[start]]
    made = run(tmp_path / "run", *words, data=flat_folder(tmp_path / "images", validation=6))
    original, aligned = graftvit.load(str(teacher)), student(made)
    assert aligned.num_classes == 10
    assert torch.equal(original.head.weight, aligned.head.weight)
    assert not any("top1" in name for record in records(made) for name in record)


def test_a_student_without_a_head_gets_none(headless: Path, tmp_path: Path) -> None:
    """A random head that nothing trains would be a claim."""
    words = [
        *FRESH,
        f"teacher=local-dir:{headless}",
        "method=block_output",
        "task_weight=0",
        "evaluate_start=true",
    ]
    made = run(tmp_path / "run", *words, data=flat_folder(tmp_path / "images"))
    assert student(made).num_classes == 0
    assert not any(name.startswith("test_") for record in records(made) for name in record)
    best = made / "checkpoints" / "best.safetensors"
    assert not best.exists(), "without test images the last state counts"


def test_the_head_of_logits_is_the_teachers(teacher: Path, tmp_path: Path) -> None:
    data = flat_folder(tmp_path / "images", validation=6)
    words = [*FRESH, f"teacher=local-dir:{teacher}", "method=logits", "task_weight=0"]
    made = run(tmp_path / "run", *words, data=data)
    assert student(made).num_classes == 10
    assert last(made)["test_objective"] > 0


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
    data = flat_folder(tmp_path / "split", validation=5)
    assert last(run(tmp_path / "measured", *words, "metric=loss", data=data))["test_objective"] > 0


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


@pytest.mark.parametrize("mode", ["finetune", "scratch", "transfer", "align"])
def test_what_learns_from_labels_says_that_they_are_missing(
    mode: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = flat_folder(tmp_path / "images", validation=3)
    words = ["train", *SHORT, f"mode={mode}", f"data_path={data}", f"output_dir={tmp_path / 'run'}"]
    words += [] if mode == "scratch" else [f"teacher=local-dir:{teacher}"]
    words += [*align(teacher), "val_split=holdout"] if mode == "align" else FRESH
    assert main(words) == 2
    said = "data.val_split=holdout is no folder" if mode == "align" else "has no class folders"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("case", ["align", "block_output", "pretrain", "logits"])
def test_the_dry_run_plans_what_the_run_does(case: str, teacher: Path, tmp_path: Path) -> None:
    of_method = [*FRESH, f"teacher=local-dir:{teacher}", "task_weight=0"]
    words = {
        "align": align(teacher),
        "pretrain": ["mode=pretrain", *FRESH, "decoder_dim=8", "decoder_depth=1", "decoder_heads=2"],
    }.get(case, [*of_method, f"method={case}"])
    data = f"data_path={flat_folder(tmp_path / 'images')}"
    config = load_config(None, [*SHORT, *words, data, f"output_dir={tmp_path / 'run'}"])
    plan, parts = describe_plan(config), build(config)
    trained = sum(p.numel() for p in parts.task.trainable.parameters() if p.requires_grad)
    classes = parts.plan.arguments["num_classes"]
    assert f"{trained:,} of " in plan
    assert (f"{classes} classes" if classes else "no head") in plan
    assert "24 training images, no labels" in plan
    assert "the last state: nothing is evaluated" in plan
    assert "not read" in describe_plan(load_config(None, [*SHORT, *words, "data_path=/nowhere"]))
    copying = load_config(None, [*SHORT, *of_method, "method=copy", data])
    for check in (build, describe_plan):
        with pytest.raises(ConfigError, match="leaves nothing to learn"):
            check(copying)
