"""A run with `transfer.cache` is the run without it; a second one runs no teacher; several processes share it."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graftvit.checkpoints.atomic import WriteFailedError
from graftvit.launch.plan_text import describe_plan
from graftvit.models.copying import teacher_view
from graftvit.models.cost import attention_macs, dense_macs
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.cached_targets import ShardLock
from graftvit.transfer.engine.dry_run import dry_run, views_of
from graftvit.transfer.engine.resume_check import Position
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from support.files.data_sets import image, write_classes, write_shards
from support.runs.engine_runs import config, differences, make_teacher, tiny_vit
from support.runs.interrupting import terminated_after
from support.runs.scenarios import RunScenario
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DATA = {"mixup": 0.0, "views": 2}
PLAIN = {"views": 0, "crop_scale": (0.08, 1.0)}
FEATURE = {"method": "feature"}
LOGITS = {"method": "logits", "temperature": 2.0}


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
    monkeypatch.setattr(loaders, "RANGE", 48)  # 130 images are three files
    return seen


def run(
    folder: Path, source: Path, cache: Path | None, transfer: dict[str, Any] = LOGITS, **sections: Any
) -> RunConfig:
    own = {**DATA, **sections.pop("data", {})}
    kept = {} if cache is None else {"cache": str(cache)}
    return config(folder, source, transfer={**transfer, **kept}, data=own, **sections)


def on_images(root: Path, count: int = 4) -> dict[str, Any]:
    """Settings of a run on as many images of two classes."""
    write_classes(root, ("a", "b"), ("train", "validation"), count=count)
    return {"dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 4}


def both(teacher: Path, convnext: Path) -> dict[str, Any]:
    """Two losses of two teachers, one of which sees larger images."""
    losses = [{**LOGITS, "weight": 1.0}, {"method": "feature", "teacher": "convnext"}]
    large = {"source": f"local-dir:{convnext}", "img_size": 32, "dtype": "bf16"}
    return {"teachers": {"convnext": large}, "transfer": {"losses": losses}}


STANDARDIZED = {**FEATURE, "standardize": "phi_s", "standardize_images": 40}


@pytest.mark.parametrize(
    "case", ["both", *(pytest.param(case, marks=pytest.mark.slow) for case in ("logits", "feature"))]
)
def test_weights_with_a_cache_are_those_without(
    case: str, teacher: Path, convnext: Path, passes: list[int], tmp_path: Path
) -> None:
    transfers = {"logits": {"transfer": LOGITS}, "feature": {"transfer": STANDARDIZED}}
    sections = {"optim": {"epochs": 3}, **transfers.get(case, both(teacher, convnext))}
    first = run(tmp_path / "first", teacher, tmp_path / "cache", **sections)
    assert ": 6 of 6 files to compute\n" in describe_plan(first)
    train(run(tmp_path / "without", teacher, None, **sections))
    passes.clear()
    train(first)
    assert set(passes) == {16}, "a padded batch gives what a full one gives"
    count = 2 * 3 * 3 * (2 if case == "both" else 1)
    assert len(passes) == count, "two views, three files, three batches each"
    passes.clear()
    second = run(tmp_path / "second", teacher, tmp_path / "cache", **sections)
    assert "6 files, complete: no teacher runs" in describe_plan(second)
    train(second)
    assert passes == []
    assert differences(tmp_path / "without", tmp_path / "first") == []
    assert differences(tmp_path / "without", tmp_path / "second") == []


@pytest.mark.slow
def test_a_cache_serves_other_students_lengths_and_more_views(
    teacher: Path, passes: list[int], tmp_path: Path
) -> None:
    cache, more = tmp_path / "cache", {"views": 3, "train_samples": 130}
    train(run(tmp_path / "one", teacher, cache, optim={"epochs": 1}))
    assert len(passes) == 9, "an epoch shows one view"
    passes.clear()
    train(run(tmp_path / "two", teacher, cache, {**LOGITS, "weight": 1.0}, data=more))
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


def places_of(made: RunConfig) -> list[str]:
    targets = build(made).targets
    assert targets is not None
    return [targets.place(shard) for shard in targets.shards([0])]


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": {"precision": "bf16"}},
        *(
            pytest.param(sections, marks=pytest.mark.slow)
            for sections in (
                {"seed": 1},
                {"data": {"hflip": 0.3}},
                {"data": PLAIN},
                {"data": {"train_samples": 129}},
                {"data": {"train_split": "validation", "val_split": "train"}},
                {"teacher": {"dtype": "bf16"}},
                {"transfer": FEATURE},
            )
        ),
    ],
    ids=str,
)
def test_other_targets_have_another_place(sections: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    """Another teacher has another one, and the same elsewhere has not."""
    first, other = (
        places_of(run(tmp_path / "run", teacher, tmp_path / "cache", **each)) for each in ({}, sections)
    )
    assert first != other
    if "engine" in sections:
        moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
        assert places_of(run(tmp_path / "run", moved, tmp_path / "cache")) == first
        another = make_teacher(tmp_path / "other", mean=(0.4,))
        assert places_of(run(tmp_path / "run", another, tmp_path / "cache")) != first


@pytest.mark.slow
def test_without_augmentation_seeds_share_targets(teacher: Path, passes: list[int], tmp_path: Path) -> None:
    plain = {"data": PLAIN, "optim": {"epochs": 3}}
    train(run(tmp_path / "one", teacher, tmp_path / "cache", **plain))
    assert len(passes) == 9
    train(run(tmp_path / "two", teacher, tmp_path / "cache", seed=5, **plain))
    assert len(passes) == 9
    train(run(tmp_path / "without", teacher, None, seed=5, **plain))
    assert differences(tmp_path / "without", tmp_path / "two") == []


def test_the_same_images_elsewhere_have_one_target(teacher: Path, passes: list[int], tmp_path: Path) -> None:
    """As the copies of two nodes."""
    names, data = [], on_images(tmp_path / "data")
    for place in ("one", "other"):
        staged = {**data, "stage": str(tmp_path / place)}
        train(run(tmp_path / f"run_{place}", teacher, tmp_path / "cache", FEATURE, data=staged))
        names.append(sorted(path.name for path in (tmp_path / "cache").rglob("*.json")))
    assert len(passes) == 2 * 2, "two views of eight images"
    assert names[0] == names[1]
    assert len(names[0]) == 2


def on_shards(root: Path) -> dict[str, Any]:
    """Settings of a run on two shards of six images."""
    write_shards(root, each=6)
    own = {"dataset": "wds/shards", "data_path": str(root), "num_classes": 10, "batch_size": 4}
    return {**own, "train_samples": None}


def test_a_run_on_shards_with_a_cache_is_the_one_without(
    teacher: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    data = on_shards(tmp_path / "shards")
    train(run(tmp_path / "without", teacher, None, data=data))
    passes.clear()
    for name, seen in (("first", True), ("second", False)):
        train(run(tmp_path / name, teacher, tmp_path / "cache", data=data))
        assert bool(passes) is seen
        assert differences(tmp_path / "without", tmp_path / name) == []
        passes.clear()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_or_missing_object_is_named_and_computed_again(
    workers: int, teacher: Path, passes: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is missing before the first step, what is damaged when it is read: then its teachers are loaded again."""
    data = {"workers": workers}
    train(run(tmp_path / "first", teacher, tmp_path / "cache", data=data))
    damaged, missing, moved, kept, cut, untyped = sorted((tmp_path / "cache").rglob("shard-*"))
    before = {path: path.read_bytes() for path in (damaged, missing, moved, cut, untyped)}
    damage(damaged)
    missing.unlink()
    shutil.copy(kept, moved)
    cut.write_bytes(cut.read_bytes()[:-99])
    untyped.write_bytes(untyped.read_bytes().replace(b"torch.float32", b"torch.flnat32"))
    passes.clear()
    train(run(tmp_path / "second", teacher, tmp_path / "cache", data=data))
    for path in (damaged, moved, cut, untyped):
        why = "a checksum" if path == damaged else "of other images"
        found = [line for line in caplog.text.splitlines() if f"{path} is damaged" in line]
        assert len(found) == 1, found
        assert why in found[0]
    assert len(passes) == 5 * 3
    assert before == {path: path.read_bytes() for path in before}
    assert differences(tmp_path / "first", tmp_path / "second") == []


def test_an_object_that_goes_away_in_a_run_is_computed_again(
    teacher: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run(tmp_path / "first", teacher, tmp_path / "cache"))
    passes.clear()
    dismiss = DualViT.dismiss

    def lose(dual: DualViT) -> None:
        for path in sorted((tmp_path / "cache").rglob("shard-*"))[:2]:
            path.unlink()
        dismiss(dual)

    monkeypatch.setattr(DualViT, "dismiss", lose)
    train(run(tmp_path / "second", teacher, tmp_path / "cache"))
    assert len(passes) == 2 * 3
    assert differences(tmp_path / "first", tmp_path / "second") == []


def test_targets_that_another_teacher_would_compute_again_stop_the_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, dismiss = make_teacher(tmp_path / "own", mean=(0.4,)), DualViT.dismiss

    def change(dual: DualViT) -> None:
        next((tmp_path / "cache").rglob("shard-*")).unlink()
        shutil.rmtree(own)
        shutil.copytree(teacher, own)
        dismiss(dual)

    monkeypatch.setattr(DualViT, "dismiss", change)
    with pytest.raises(DataError, match="the teacher is another one than when the run began"):
        train(run(tmp_path / "run", own, tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["memory", pytest.param("file", marks=pytest.mark.slow)])
def test_a_bucket_is_filled_and_read(kind: str, teacher: Path, passes: list[int], tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    train(run(tmp_path / "without", teacher, None, FEATURE))
    bucket = f"{kind}://{tmp_path}/targets"
    passes.clear()
    train(run(tmp_path / "first", teacher, None, {**FEATURE, "cache": bucket}))
    assert len(passes) == 18
    passes.clear()
    second = run(tmp_path / "second", teacher, None, {**FEATURE, "cache": bucket})
    assert "6 files, complete: no teacher runs" in describe_plan(second)
    train(second)
    assert passes == []
    for name in ("first", "second"):
        assert differences(tmp_path / "without", tmp_path / name) == []


@pytest.mark.parametrize("form", [{}, {"cache_type": "int8", "cache_top": 3}], ids=str)
def test_the_dry_run_says_the_bytes_that_are_then_on_the_disk(
    form: dict[str, Any], teacher: Path, passes: list[int], tmp_path: Path
) -> None:
    made = run(tmp_path / "run", teacher, tmp_path / "cache", {**LOGITS, **form})
    planned = dry_run(made, 1, here=True).targets
    assert planned is not None
    assert planned.whole == planned.missing
    macs = dense_macs(tiny_vit()) + sum(attention_macs(tiny_vit()))
    assert (planned.flop, planned.shown) == (2 * macs, 2 * 128)
    train(made)
    there = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("shard-*"))
    assert planned.whole == pytest.approx(there, rel=0.01)


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
    teacher: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = run(tmp_path / "first", teacher, tmp_path / "cache")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=11_000))
        with pytest.raises(ConfigError, match=r"lacks 0\.1 MiB, more than 90% of the 0\.1 MiB that are free"):
            train(cached)
        dry_run(cached, 1, here=False)
    targets = build(cached).targets
    assert targets is not None
    targets.open()
    (Path(targets.folder) / "view-000").write_text("root may write into every folder, but not into this file")
    with pytest.raises(
        WriteFailedError, match=r"is missing or damaged, and cannot be written .* another folder"
    ):
        train(cached)
    assert passes == []


def test_an_image_that_changed_stops_the_run(teacher: Path, tmp_path: Path) -> None:
    data = on_images(tmp_path / "images")
    train(run(tmp_path / "first", teacher, tmp_path / "cache", FEATURE, data=data))
    changed = tmp_path / "images" / "train" / "b" / "101.png"
    image(7).save(changed)
    with pytest.raises(DataError, match=f"{changed} is not the image that its targets in transfer.cache"):
        train(run(tmp_path / "second", teacher, tmp_path / "cache", FEATURE, data=data))


@pytest.mark.parametrize("change", ["images", "labels"])
def test_the_accuracy_of_a_teacher_is_measured_again_on_other_test_images_and_classes(
    change: str, tmp_path: Path
) -> None:
    root, own = tmp_path / "images", make_teacher(tmp_path / "teacher", classes=2)
    for split, number in itertools.product(("train", "validation"), range(8)):
        path = root / split / "ab"[number % 2] / f"{number}.bmp"  # all files are as large as one another
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(path)
    data = {"dataset": "", "data_path": str(root), "train_samples": None, "batch_size": 4}
    described = json.loads((own / "config.json").read_text())

    def name_classes(*names: str) -> None:
        (own / "config.json").write_text(json.dumps({**described, "label_names": names}))

    def measured(name: str) -> float:
        given: dict[str, Any] = {"data": data, "optim": {"max_steps": 1}}
        found = train(run(tmp_path / name, own, tmp_path / "cache", FEATURE, **given))
        return float(found.metrics["teacher_top1"])

    name_classes("a", "b")
    before = measured("first")
    assert before not in (0.0, 50.0, 100.0), "another order of the classes is another accuracy"
    assert measured("second") == before
    if change == "labels":
        name_classes("b", "a")
    else:
        a, b, aside = (root / "validation" / name for name in ("a", "b", "aside"))
        a.rename(aside), b.rename(a), aside.rename(b)
    assert measured("third") == pytest.approx(100.0 - before)
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("teacher_top1-*.json"))) == 2


@pytest.mark.slow
def test_a_stop_while_targets_are_computed_keeps_whole_files(
    teacher: Path, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, cut = DualViT.teach, run(tmp_path / "cut", teacher, tmp_path / "cache")

    def stopping(dual: DualViT, images: Tensor) -> dict[str, Tensor]:
        if len(passes) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(dual, images)

    with monkeypatch.context() as patch:
        patch.setattr(DualViT, "teach", stopping)
        assert train(cut).signal == signal.SIGTERM
    early_signals.received.clear()
    assert len(list((tmp_path / "cache").rglob("shard-*.rows"))) == 3
    kept = (
        tmp_path / "cut" / "targets.txt"
    ).read_text()  # a job at its time limit knows that it came further
    assert Path(kept.strip()).parent == tmp_path / "cache"
    assert not list((tmp_path / "cache").rglob(".*")), "locks and unfinished files are gone"
    passes.clear()
    train(cut)
    assert len(passes) == 9
    train(run(tmp_path / "whole", teacher, None))
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


OF_BLOCKS = {"losses": [{"method": "logits"}, {"method": "block_output"}]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"transfer": {"method": "distill"}}, "transfer.cache=.*transfer.method=distill, which takes maps"),
        ({"transfer": {"method": "copy"}}, "transfer.method=copy, which takes maps"),
        ({"transfer": OF_BLOCKS}, "transfer.method=block_output"),
        (
            {"transfer": {**LOGITS, "cache_pool": 2}},
            "transfer.cache_pool=2 changes nothing without a loss of patches",
        ),
        (
            {"transfer": {**LOGITS, "cache_top": 10}},
            "transfer.cache_top=10 is no part of the teacher's 10 classes",
        ),
        ({"data": {"views": None}}, "set data.views to a number, or to 0"),
        ({"data": {**PLAIN, "reprob": 0.2}}, "data.reprob=0.2 changes nothing with data.views=0"),
        ({"data": {"mixup": 0.2}}, "data.mixup=0.2, which mixes"),
        ({"data": {"cutmix": 1.0}}, "data.cutmix=1, which mixes"),
        ({"transfer": {**FEATURE, "share_drop_path": True}}, "transfer.share_drop_path=true"),
        ({"transfer": {**FEATURE, "task_weight": 0.0}}, "set engine.metric to top1, knn or probe"),
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


@pytest.mark.parametrize("cache", ["", "file", "https://host/targets"])
def test_a_cache_is_a_folder_or_a_bucket(
    cache: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    made = run(tmp_path / "run", teacher, None, {**LOGITS, "cache": cache})
    with pytest.raises(ConfigError, match=f"transfer.cache='{cache}' is neither a folder"):
        dry_run(made, 1, here=True)


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


NONE = {"one": [], "two": []}
BATCHES = 2 * (5 * 2 + 1)
"""Two views of six files; a file of 24 images is two batches, the last one of ten images is one."""


def test_the_loader_processes_of_a_run_end_with_it(teacher: Path, tmp_path: Path) -> None:
    others = multiprocessing.active_children()
    gc.disable()  # what ends them must not wait for it
    try:
        train(run(tmp_path / "run", teacher, tmp_path / "cache", data={"workers": 1}, optim={"epochs": 1}))
        assert [each for each in multiprocessing.active_children() if each not in others] == []
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "ends", "passes"),
    [
        ("killed", [[0], [-signal.SIGKILL], [-signal.SIGKILL], [0], [0]], BATCHES - 2 * 3),
        ("beside", [[0]] * 5, 0),
        ("ranks", [[0, 0]] * 3, 2 * (5 * 3 + 2)),
        ("workers", [[0]] * 3, BATCHES),
    ],
)
def test_processes_share_a_cache_and_compute_each_file_once(
    scenario: str, ends: list[list[int]], passes: int, run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("engine_cache", scenario, tmp_path)
    assert report["ends"] == ends, report
    assert report["passes"] == [passes, 0]
    assert report.get("kept") == (1 + 2 if scenario == "killed" else None)
    assert (report.get("both"), report.get("other")) == (
        (BATCHES, []) if scenario == "beside" else (None, None)
    )
    assert report["differences"] == NONE
    assert report["left"] == []


def test_a_lock_is_of_one_process_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "view-000" / "shard"
    lock = ShardLock.take(str(path))
    assert lock is not None
    assert ShardLock.take(str(path)) is None
    lock.free()
    again = ShardLock.take(str(path))
    assert again is not None
    again.free()
    assert list(path.parent.iterdir()) == []
