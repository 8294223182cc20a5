"""A run with `transfer.cache` is the run without it, and a second one runs no teacher."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftvit.checkpoints.atomic import WriteFailedError
from graftvit.launch.plan_text import describe_plan
from graftvit.models.copying import teacher_view
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.cache import target_shards
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.cached_targets import views_of
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.resume_check import Position
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from support.files.data_sets import image, write_classes
from support.runs.engine_runs import config, differences, make_convnext, make_teacher
from support.runs.interrupting import terminated_after
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DATA = {"mixup": 0.0, "views": 2}
PLAIN = {"views": 0, "crop_scale": (0.08, 1.0)}
LOGITS = {"method": "logits", "temperature": 2.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_convnext(tmp_path_factory.mktemp("teachers") / "convnext")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each forward pass of a teacher."""
    seen: list[int] = []
    forward = teacher_view.WholeModel.forward

    def counted(view: teacher_view.WholeModel, images: Tensor) -> None:
        if not isinstance(images, FakeTensor):  # shapes alone, for the size of the cache
            seen.append(len(images))
        forward(view, images)

    monkeypatch.setattr(teacher_view.WholeModel, "forward", counted)
    monkeypatch.setattr(target_shards, "SMALLEST_SHARD", 48)  # 130 images are three files
    return seen


def run(
    folder: Path, source: Path, cache: Path | None, transfer: dict[str, Any] = LOGITS, **sections: Any
) -> RunConfig:
    own = {**DATA, **sections.pop("data", {})}
    kept = {} if cache is None else {"cache": str(cache)}
    return config(folder, source, transfer={**transfer, **kept}, data=own, **sections)


def both(teacher: Path, convnext: Path) -> dict[str, Any]:
    """Two losses of two teachers, one of which sees larger images."""
    losses = [{**LOGITS, "weight": 1.0}, {"method": "feature", "teacher": "convnext"}]
    return {
        "teachers": {"convnext": {"source": f"local-dir:{convnext}", "img_size": 32, "dtype": "bf16"}},
        "transfer": {"losses": losses},
    }


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("logits", "feature")]


@pytest.mark.parametrize("case", [*SLOW, "both"])
def test_weights_with_a_cache_are_those_without(
    case: str, teacher: Path, convnext: Path, passes: list[int], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"optim": {"epochs": 3}}
    sections |= both(teacher, convnext) if case == "both" else {"transfer": {**LOGITS, "method": case}}
    if case == "feature":
        sections["transfer"] = {"method": "feature", "standardize": "phi_s", "standardize_images": 40}
    train(run(tmp_path / "without", teacher, None, **sections))
    passes.clear()
    train(run(tmp_path / "first", teacher, tmp_path / "cache", **sections))
    assert set(passes) == {16}, "a padded batch gives what a full one gives"
    assert len(passes) == 2 * 3 * 3 * (2 if case == "both" else 1), (
        "two views, three files, three batches each"
    )
    passes.clear()
    train(run(tmp_path / "second", teacher, tmp_path / "cache", **sections))
    assert passes == []
    assert differences(tmp_path / "without", tmp_path / "first") == []
    assert differences(tmp_path / "without", tmp_path / "second") == []


@pytest.mark.slow
def test_a_cache_serves_other_students_lengths_and_more_views(
    teacher: Path, passes: list[int], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    train(run(tmp_path / "one", teacher, cache, optim={"epochs": 1}))
    assert len(passes) == 9, "an epoch shows one view"
    passes.clear()
    train(
        run(
            tmp_path / "two",
            teacher,
            cache,
            {**LOGITS, "weight": 1.0},
            data={"views": 3, "train_samples": 130},
        )
    )
    assert len(passes) == 9, "the first of three views is that of two"
    passes.clear()
    student = {"drop_path": 0.1}
    train(run(tmp_path / "three", teacher, cache, {"method": "logits"}, student=student, optim={"blr": 0.1}))
    assert passes == []
    assert len(list(cache.iterdir())) == 1


def test_a_finished_run_that_goes_on_shows_the_view_of_its_next_epoch(tmp_path: Path) -> None:
    schedule = SimpleNamespace(total_steps=3, steps_per_epoch=8)
    longer = run(tmp_path, tmp_path, tmp_path, data={"views": 3})
    assert views_of(longer, schedule, Position(step=2, epoch=1)) == [1]  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"seed": 1},
        {"data": {"hflip": 0.3}},
        {"data": PLAIN},
        {"data": {"train_samples": 129}},
        {"data": {"train_split": "validation", "val_split": "train"}},
        {"engine": {"precision": "bf16"}},
        {"teacher": {"dtype": "bf16"}},
        {"transfer": {"method": "feature"}},
    ],
    ids=str,
)
def test_other_targets_have_another_folder(sections: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    made = [build(run(tmp_path / "run", teacher, tmp_path / "cache", **each)) for each in ({}, sections)]
    first, other = (parts.targets for parts in made)
    assert first is not None
    assert other is not None
    assert first.folder != other.folder


def test_another_teacher_has_another_folder_and_the_same_elsewhere_has_not(
    teacher: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    torch.manual_seed(0)
    other = make_teacher(tmp_path / "other", mean=(0.4,))
    folders = []
    for source in (teacher, moved, other):
        targets = build(run(tmp_path / "run", source, tmp_path / "cache")).targets
        assert targets is not None
        folders.append(targets.folder)
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.slow
def test_without_augmentation_seeds_share_targets(teacher: Path, passes: list[int], tmp_path: Path) -> None:
    plain = {"data": PLAIN, "optim": {"epochs": 3}}
    train(run(tmp_path / "one", teacher, tmp_path / "cache", **plain))
    assert len(passes) == 9
    train(run(tmp_path / "two", teacher, tmp_path / "cache", seed=5, **plain))
    assert len(passes) == 9
    train(run(tmp_path / "without", teacher, None, seed=5, **plain))
    assert differences(tmp_path / "without", tmp_path / "two") == []


def test_the_same_images_elsewhere_have_the_same_targets(
    teacher: Path, passes: list[int], tmp_path: Path
) -> None:
    """As the copies of two nodes."""
    folders = []
    for place in ("one", "other"):
        root = write_classes(tmp_path / "data", ("a", "b"), ("train", "validation"), count=4)
        data = {
            "dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 4,
            "stage": str(tmp_path / place),
        }  # fmt: skip
        made = run(tmp_path / f"run_{place}", teacher, tmp_path / "cache", {"method": "feature"}, data=data)
        train(made)
        folders.append(sorted(path.name for path in (tmp_path / "cache").rglob("*.json")))
    assert len(passes) == 2 * 2, "two views of eight images"
    assert folders[0] == folders[1]
    assert len(folders[0]) == 2


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_or_missing_file_is_named_and_computed_again(
    teacher: Path, passes: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run(tmp_path / "first", teacher, tmp_path / "cache"))
    damaged, missing, moved, kept, *_ = sorted((tmp_path / "cache").rglob("shard-*"))
    damage(damaged)
    missing.unlink()
    shutil.copy(kept, moved)
    passes.clear()
    train(run(tmp_path / "second", teacher, tmp_path / "cache"))
    assert caplog.text.count(f"{damaged} is damaged: its sha256 does not match") == 1
    assert f"{moved} is not of these images" in caplog.text
    assert len(passes) == 9
    assert differences(tmp_path / "first", tmp_path / "second") == []


def test_a_cut_description_of_a_cache_is_written_again(
    teacher: Path, passes: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run(tmp_path / "first", teacher, tmp_path / "cache"))
    (about,) = (tmp_path / "cache").rglob("about.json")
    whole = about.read_bytes()
    about.write_bytes(whole[:-9])
    passes.clear()
    train(run(tmp_path / "second", teacher, tmp_path / "cache"))
    assert (about.read_bytes(), passes) == (whole, [])
    assert f"{about} is damaged; it is written again" in caplog.text
    about.write_text("{}")
    with pytest.raises(ConfigError, match="describes other targets: remove the folder"):
        train(run(tmp_path / "third", teacher, tmp_path / "cache"))


def test_a_cache_that_lacks_targets_and_cannot_be_written_says_what_to_do(
    teacher: Path, tmp_path: Path
) -> None:
    cached = run(tmp_path / "first", teacher, tmp_path / "cache")
    parts = build(cached)
    assert parts.targets is not None
    parts.targets.open()
    (parts.targets.folder / "view-000").write_text("root may write into every folder, but not into this file")
    with pytest.raises(
        WriteFailedError, match=r"is missing or damaged, and cannot be written .* another folder"
    ):
        train(cached)


def test_an_image_that_changed_stops_the_run(teacher: Path, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", ("a", "b"), ("train", "validation"), count=4)
    data = {"dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 4}
    train(run(tmp_path / "first", teacher, tmp_path / "cache", {"method": "feature"}, data=data))
    changed = root / "train" / "b" / "101.png"
    image(7).save(changed)
    with pytest.raises(DataError, match=f"{changed} is not the image that its targets in transfer.cache"):
        train(run(tmp_path / "second", teacher, tmp_path / "cache", {"method": "feature"}, data=data))


def exchange_images(root: Path, teacher: Path) -> None:
    one, other = (sorted((root / "validation" / name).iterdir()) for name in ("a", "b"))
    for first, second in zip(one, other, strict=True):
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)


def rename_labels(root: Path, teacher: Path) -> None:
    described = json.loads((teacher / "config.json").read_text())
    described["label_names"] = ["b", "a"]
    (teacher / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize("change", [exchange_images, rename_labels])
def test_the_accuracy_of_a_teacher_is_measured_again_on_other_test_images_and_classes(
    change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    root = tmp_path / "images"
    for split, number in itertools.product(("train", "validation"), range(8)):
        path = root / split / "ab"[number % 2] / f"{number}.bmp"  # all files are as large as one another
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(path)
    data = {"dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 4}
    own = make_teacher(tmp_path / "teacher", classes=2)
    described = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**described, "label_names": ["a", "b"]}))
    given: dict[str, Any] = {"data": data, "optim": {"max_steps": 1}}

    def measured(name: str) -> float:
        found = train(run(tmp_path / name, own, tmp_path / "cache", {"method": "feature"}, **given))
        return float(found.metrics["teacher_top1"])

    before = measured("first")
    assert before not in (0.0, 50.0, 100.0), "another order of the classes is another accuracy"
    assert measured("second") == before
    change(root, own)
    assert measured("third") == pytest.approx(100.0 - before)
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("teacher_top1-*.json"))) == 2


@pytest.mark.slow
def test_a_stop_while_targets_are_computed_keeps_whole_files(
    teacher: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DualViT.teach

    def stopping(dual: DualViT, images: Tensor) -> dict[str, Tensor]:
        if len(passes) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(dual, images)

    with monkeypatch.context() as patch:
        patch.setattr(DualViT, "teach", stopping)
        assert train(run(tmp_path / "cut", teacher, tmp_path / "cache")).signal == signal.SIGTERM
    early_signals.received.clear()
    assert len(list((tmp_path / "cache").rglob("shard-*"))) == 3
    kept = (
        tmp_path / "cut" / "targets.txt"
    )  # by which a job that meets its time limit knows that it came further
    assert Path(kept.read_text().strip()).parent == tmp_path / "cache"
    assert not list((tmp_path / "cache").rglob(".*")), "locks and unfinished files are gone"
    passes.clear()
    train(run(tmp_path / "cut", teacher, tmp_path / "cache"))
    assert len(passes) == 9
    train(run(tmp_path / "whole", teacher, None))
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"transfer": {"method": "distill"}}, "transfer.cache=.*transfer.method=distill, which takes maps"),
        ({"transfer": {"method": "copy"}}, "transfer.method=copy, which takes maps"),
        (
            {"transfer": {"losses": [{"method": "logits"}, {"method": "block_output"}]}},
            "transfer.method=block_output",
        ),
        ({"transfer": {"method": "feature", "tokens": "both"}}, "use logits or feature with tokens=pooled"),
        ({"data": {"views": None}}, "set data.views to a number, or to 0"),
        ({"data": {**PLAIN, "reprob": 0.2}}, "data.reprob=0.2 changes nothing with data.views=0"),
        ({"data": {"mixup": 0.2}}, "data.mixup=0.2, which mixes"),
        ({"data": {"cutmix": 1.0}}, "data.cutmix=1, which mixes"),
        ({"transfer": {"method": "feature", "share_drop_path": True}}, "transfer.share_drop_path=true"),
        ({"transfer": {"method": "feature", "task_weight": 0.0}}, "set engine.metric to top1, knn or probe"),
        ({"transfer": {**LOGITS, "cache_limit": 1e-6}}, "would hold 0.1 MiB.*transfer.cache_limit=1e-06 GiB"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused(
    sections: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    made = run(tmp_path / "run", teacher, tmp_path / "cache", **sections)
    for refuses in (lambda: dry_run(made, 1, here=True), lambda: train(made)):
        with pytest.raises(ConfigError, match=message):
            refuses()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cache", ["", "file"])
def test_a_cache_is_a_folder(
    cache: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    made = run(tmp_path / "run", teacher, None, {**LOGITS, "cache": cache})
    with pytest.raises(ConfigError, match=f"transfer.cache='{cache}' is not a folder"):
        dry_run(made, 1, here=True)


def test_a_full_disk_is_refused_before_anything_is_computed(
    teacher: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=11_000))
    made = run(tmp_path / "run", teacher, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"lacks 0\.1 MiB, more than 90% of the 0\.1 MiB that are free"):
        train(made)
    assert passes == []
    dry_run(made, 1, here=False)


@pytest.mark.slow
def test_the_dry_run_says_what_is_there(teacher: Path, tmp_path: Path) -> None:
    made = run(tmp_path / "run", teacher, tmp_path / "cache")
    before = describe_plan(made)
    assert "targets        130 images in 2 views, 0.1 MiB in " in before
    assert ": 2 of 2 files to compute\n" in before
    train(made)
    assert "2 files, complete: no teacher runs" in describe_plan(
        run(tmp_path / "next", teacher, tmp_path / "cache")
    )


@pytest.mark.slow
def test_a_run_resumes_with_a_cache_or_without(teacher: Path, passes: list[int], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    train(run(tmp_path / "whole", teacher, None, optim={"epochs": 3}))
    with terminated_after(10):
        assert train(run(tmp_path / "cut", teacher, None, optim={"epochs": 3})).signal
    early_signals.received.clear()
    passes.clear()
    train(run(tmp_path / "cut", teacher, cache, optim={"epochs": 3}))
    assert len(passes) == 18
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
