"""Kept views change no bit of any batch, whatever is missing, cut or damaged, and whoever writes them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.digits import DigitsSource
from graftvit.transfer.data.image_folder import FolderImages
from graftvit.transfer.data.kept_views import KeptViews
from graftvit.transfer.data.loaders import TrainLoader, create_train_loader
from graftvit.transfer.data.shards import ShardImages
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from support.files.data_sets import encoded, write_classes, write_tar
from support.runs.engine_runs import config, differences, make_teacher
from torch import Tensor

GRAY, RGB = (
    Preprocessing((1, 12, 8), (0.5,), (0.4,)),
    Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
)
DIGITS: dict[str, Any] = {
    "dataset": "digits",
    "train_samples": 30,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
}
ROW = 4096
Batches = list[tuple[Tensor, Tensor]]


def loader(
    folder: Path | None, world: tuple[int, int] = (0, 1), spec: Preprocessing = GRAY, **keys: Any
) -> TrainLoader:
    kept = None if folder is None else str(folder)
    own = DataConfig(**{"workers": 0, "batch_size": 4, "views": 2, "keep_views": kept, **DIGITS, **keys})
    return create_train_loader(own, spec, seed=3, rank=world[0], world_size=world[1])


def epochs(found: TrainLoader, count: int = 4) -> Batches:
    return [batch for epoch in range(count) for batch in found.epoch(epoch)]


def same(first: Batches, second: Batches) -> bool:
    return all(a.equal(c) and b.equal(d) for (a, b), (c, d) in zip(first, second, strict=True))


def rows(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.rows"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples that were decoded in this process."""
    seen: list[int] = []
    for kind in (DigitsSource, FolderImages, ShardImages):

        def read(source: Any, index: int, real: Any = kind.read) -> Any:
            seen.append(index)
            return real(source, index)

        monkeypatch.setattr(kind, "read", read)
    return seen


@pytest.mark.parametrize("keys", [{}, {"views": 0, "aa": None}, {"aa": "affine", "mixup": 0.0}], ids=str)
def test_kept_images_are_those_without_and_are_decoded_once(
    keys: dict[str, Any], reads: list[int], tmp_path: Path
) -> None:
    plain, views = epochs(loader(None, **keys)), max(1, keys.get("views", 2))
    reads.clear()
    assert same(epochs(loader(tmp_path, **keys)), plain)
    assert len(reads) <= 30 * views
    reads.clear()
    assert same(epochs(loader(tmp_path, **keys), views), plain[: 7 * views])
    assert reads == []
    assert [path.stat().st_size <= 30 * ROW for path in rows(tmp_path)] == [True] * views


def test_ranks_and_loader_processes_write_one_set(reads: list[int], tmp_path: Path) -> None:
    for rank in range(2):
        epochs(loader(tmp_path, (rank, 2), workers=2, batch_size=5))
    assert same(epochs(loader(tmp_path)), epochs(loader(None)))
    assert len(reads) == 4 * 28, "of the run that keeps nothing"


def test_a_row_that_is_damaged_cut_or_missing_is_made_again(
    reads: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = epochs(loader(None, batch_size=5))
    epochs(loader(tmp_path, batch_size=5))
    first, second = rows(tmp_path)
    content = bytearray(first.read_bytes())
    content[4 * ROW + 40] ^= 1
    content[5 * ROW : 6 * ROW] = bytes(ROW)
    content[6 * ROW : 7 * ROW] = content[7 * ROW : 8 * ROW]
    first.write_bytes(content[: 29 * ROW + 50])
    kept = second.read_bytes()
    second.unlink()
    reads.clear()
    assert same(epochs(loader(tmp_path, batch_size=5), 2), plain[:12])
    subset = loader(None).batches._subset
    assert sorted(reads[:4]) == sorted(int(subset[index]) for index in (4, 5, 6, 29))
    assert len(reads) == 4 + 30
    assert caplog.text.count("is damaged or of another image") == 2
    assert f"in {first}" in caplog.text
    reads.clear()
    assert same(epochs(loader(tmp_path, batch_size=5)), plain)
    assert reads == []
    first.write_bytes(kept)
    assert same(epochs(loader(tmp_path, batch_size=5), 2), plain[:12]), "rows of another view are made again"


def killed_in_row(number: int, found: TrainLoader) -> None:
    """Show an epoch, and die in the middle of writing a row."""
    checksum, left = KeptViews._checksum, iter(range(number))

    def dying(*arguments: Any) -> int:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return checksum(*arguments)

    KeptViews._checksum = dying  # type: ignore[method-assign]
    epochs(found, 1)


def test_a_process_that_is_killed_leaves_whole_rows(reads: list[int], tmp_path: Path) -> None:
    for done in (0, 7, 20):
        process = multiprocessing.get_context("fork").Process(
            target=killed_in_row, args=(done, loader(tmp_path))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    plain = epochs(loader(None), 1)
    reads.clear()
    assert same(epochs(loader(tmp_path), 1), plain)
    assert len(reads) == 28 - 20


def test_an_unreadable_image_is_replaced_and_counted_as_without(reads: list[int], tmp_path: Path) -> None:
    write_classes(tmp_path / "data", ("a", "b"), ("train",), count=4)
    damaged = sorted((tmp_path / "data" / "train" / "a").iterdir())[1]
    damaged.write_bytes(b"no image")
    keys: dict[str, Any] = {"dataset": "", "data_path": str(tmp_path / "data"), "train_samples": None}
    keys |= {"max_bad_images": 1, "spec": RGB, "batch_size": 8, "mixup": 0.0}
    plain = epochs(loader(None, **keys))
    for again in range(2):
        reads.clear()
        found = loader(tmp_path / "kept", **keys)
        assert same(epochs(found), plain)
        assert found.bad_images == [str(damaged)]
        assert len(reads) == (2 * 7 + 4 * 2, 4 * 2)[again], (
            "it has no row, and neither has what stands in for it"
        )


def test_labels_and_images_are_those_of_today(reads: list[int], tmp_path: Path) -> None:
    """Another class before the others gives all another number; a folder elsewhere has the same images."""
    keys: dict[str, Any] = {"dataset": "", "train_samples": None, "spec": RGB, "batch_size": 8, "mixup": 0.0}
    write_classes(tmp_path / "one", ("b", "c"), ("train",), count=4)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = epochs(loader(tmp_path / "kept", data_path=str(tmp_path / "one"), **keys))
    reads.clear()
    assert same(epochs(loader(tmp_path / "kept", data_path=str(tmp_path / "two"), **keys)), first)
    assert reads == []
    two = tmp_path / "two" / "train"
    (two / "b").rename(two / "d")
    moved = {"data_path": str(tmp_path / "two"), **keys}
    assert same(epochs(loader(tmp_path / "kept", **moved)), epochs(loader(None, **moved)))
    changed = next((two / "c").iterdir())
    changed.write_bytes(encoded(77, side=40))
    assert same(epochs(loader(tmp_path / "kept", **moved)), epochs(loader(None, **moved)))


def test_rows_of_shards_hold_the_labels(
    reads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = [(f"{number}.png", encoded(number)) for number in range(9)]
    samples += [(f"{number}.cls", str(number % 3).encode()) for number in range(9)]
    write_tar(tmp_path / "s-0.tar", dict(sorted(samples)))
    keys: dict[str, Any] = {"dataset": "wds/s", "data_path": str(tmp_path), "train_split": "s-0.tar"}
    keys |= {"num_classes": 3, "train_samples": None, "spec": RGB, "mixup": 0.0}
    plain = epochs(loader(None, **keys))
    assert same(epochs(loader(tmp_path / "kept", **keys)), plain)
    epochs(loader(tmp_path / "kept", batch_size=9, **keys))
    reads.clear()
    assert same(epochs(loader(tmp_path / "kept", **keys)), plain)
    assert reads == []
    samples = [(name, encoded(77, side=40) if name == "4.png" else content) for name, content in samples]
    write_tar(tmp_path / "s-0.tar", dict(sorted(samples)))
    assert same(epochs(loader(tmp_path / "kept", **keys)), epochs(loader(None, **keys)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"views": None}, "changes nothing without data.views, so that no image is seen twice"),
        (
            {"reprob": 0.5},
            "data.keep_views=.* does not go with data.reprob=0.5, whose noise no bytes can hold",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = config(tmp_path / "run", data={"views": 2, "keep_views": str(tmp_path / "kept"), **keys})
    with pytest.raises(ConfigError, match=message):
        dry_run(made, 1, here=True)
    with pytest.raises(ConfigError, match="a folder has a name"):
        DataConfig(views=2, keep_views=" ")


def test_a_disk_that_is_full_or_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path / "run", data={"views": 2, "keep_views": str(tmp_path / "kept")})
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=11_000))
        for refuses in (lambda: dry_run(made, 1, here=True), lambda: train(made)):
            with pytest.raises(ConfigError, match=r"lacks 1\.1 MiB, more than the 0\.1 MiB that are free"):
                refuses()
        dry_run(made, 1, here=False)
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"view-000.rows cannot be read or written \(Not a directory\): make room"
    ):
        epochs(loader(tmp_path / "file"))


def test_a_run_with_kept_views_and_targets_is_the_run_without(reads: list[int], tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")

    def run(name: str, **keys: Any) -> Any:
        data = {"mixup": 0.0, "views": 2, **keys}
        targets = {"method": "logits", "cache": str(tmp_path / "targets")}
        return config(
            tmp_path / name, teacher, transfer=targets, data=data, engine={"evaluate_teacher": False}
        )

    train(run("without"))
    kept = run("kept", keep_views=str(tmp_path / "views"))
    assert f"kept views     2 views, 1.0 MiB in {tmp_path / 'views'}" in describe_plan(kept)
    train(kept)
    assert differences(tmp_path / "without", tmp_path / "kept") == []
    assert ", of which 1.0 MiB are there\n" in describe_plan(run("again", keep_views=str(tmp_path / "views")))
    reads.clear()
    train(run("third", keep_views=str(tmp_path / "views"), val_split=None))
    assert reads == []
