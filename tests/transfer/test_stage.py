"""A data set on a node's own disk: what is copied, once, checked, and read as the source is; runs that read it."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.cli import main
from graftvit.models.errors import ConfigError, DataError, GraftError
from graftvit.models.plain_yaml import parse_yaml
from graftvit.transfer import staging
from graftvit.transfer.config import DataConfig, RunConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.data.datasets import check_apart, check_dataset, open_dataset
from graftvit.transfer.data.image_folder import FolderImages, ImageSource
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine import fit_operators as together
from graftvit.transfer.engine.train import train
from graftvit.transfer.staging import StagingStoppedError, check_stage, find_source, stage
from support.files.data_sets import encoded, write_classes, write_images, write_shards, write_tar
from support.files.image_folders import class_folder
from support.runs.engine_runs import config, differences, make_teacher
from support.runs.interrupting import terminated_after


def settings(path: Path, disk: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"data_path": str(path), "stage": str(disk), **more})


@pytest.fixture
def flowers(tmp_path: Path) -> DataConfig:
    """Two classes of images, and a disk to stage them on."""
    return settings(write_classes(tmp_path / "flowers", ["a", "b"]), tmp_path / "disk")


def refusal(config: DataConfig, match: str, kind: type[GraftError] = DataError) -> None:
    """The staging ends in one sentence, and leaves no copy."""
    with pytest.raises(kind, match=match) as caught:
        stage(config)
    assert "\n" not in str(caught.value)
    assert copies(Path(str(config.stage))) == []


def local_of(config: DataConfig) -> Path:
    """Stage, and return the folder or file of the copy."""
    return Path(str(stage(config).data_path))


def images_of(config: DataConfig, split: str) -> tuple[ImageSource, list[str]]:
    """The images of a split, and their names."""
    source = open_dataset(config, split, 3, training=False)
    assert not hasattr(source, "__iter__")
    return source, [source.path(index).removeprefix(str(config.data_path)) for index in range(len(source))]  # type: ignore


def seen(config: DataConfig, split: str) -> list[tuple[str, int, bytes]]:
    """Name, label and pixels of each image, in the order of the data set."""
    source, names = images_of(config, split)
    read = [source.read(index) for index in range(len(names))]
    return [(name, label, image.tobytes()) for name, (image, label) in zip(names, read, strict=True)]


def copies(disk: Path) -> list[Path]:
    return [path for path in disk.glob("graftvit-data-*/*") if not path.name.startswith(".")]


def test_a_folder_is_copied_once_and_reads_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_classes(tmp_path / ("ö" * 120), ["rose", "daisy10", "daisy9"])  # a long name is cut
    write_images(root / "train" / "rose", 1, first=77, suffix="PNG")
    (root / "notes.txt").write_text("not an image")
    config = settings(root, tmp_path / "disk")
    own = tmp_path / "disk" / f"graftvit-data-{os.getuid()}"
    own.mkdir(parents=True, mode=0o755)
    local = stage(config)
    assert own.stat().st_mode & 0o777 == 0o700, "it is for this user alone"
    assert own.parent.stat().st_mode & 0o077
    assert local.stage is None
    assert Path(str(local.data_path)).is_relative_to(tmp_path / "disk")
    for split in ("train", "validation"):
        assert seen(local, split) == seen(config, split)
    assert "copies" in caplog.text
    caplog.clear()
    before = {path: path.stat().st_mtime_ns for path in Path(str(local.data_path)).rglob("*")}
    assert stage(config) == local
    assert {path: path.stat().st_mtime_ns for path in Path(str(local.data_path)).rglob("*")} == before
    assert "copies" not in caplog.text
    assert not list(tmp_path.glob("disk/*/*/notes.txt"))


def test_a_folder_without_splits_and_a_plain_tar_are_read_in_the_same_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "photos" / name, 2)
    tar = write_tar(tmp_path / "flowers.tar", members("x/b10", "x/b9", "y/a"))
    for path in (tmp_path / "photos", tar):
        config = settings(path, tmp_path / "disk")
        local = stage(config)
        assert Path(str(local.data_path)).name.startswith(path.name)
        assert [entry[1:] for entry in seen(local, "train")] == [entry[1:] for entry in seen(config, "train")]


def test_a_source_that_changed_is_copied_anew(flowers: DataConfig) -> None:
    root, first = Path(str(flowers.data_path)), stage(flowers)
    os.utime(root / "train" / "a" / "000.png", ns=(1, 1))
    second = stage(flowers)
    write_images(root / "val" / "b", 1, first=900)
    third = stage(flowers)
    assert len({first.data_path, second.data_path, third.data_path}) == 3
    assert seen(third, "validation") == seen(flowers, "validation")


@pytest.mark.parametrize("damage", ["removed", "shortened", "marker", "partial"])
def test_what_was_cut_short_is_made_again(flowers: DataConfig, damage: str) -> None:
    local = local_of(flowers)
    image = next(local.rglob("*.png"))
    if damage == "removed":
        image.unlink()
    elif damage == "shortened":
        image.write_bytes(image.read_bytes()[:-1])
    elif damage == "marker":
        local.with_name(f".{local.name}.json").unlink()
    else:
        image.unlink()
        local.rename(local.with_name(f".{local.name}.partial"))
    again = stage(flowers)
    for split in ("train", "validation"):
        assert seen(again, split) == seen(flowers, split)
    assert not list(local.parent.glob("*.partial"))


def test_a_full_disk_is_told_before_anything_is_copied(
    flowers: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 2 * 4096)
    refusal(flowers, r"cannot hold .*flowers: the copy needs 48 KiB, and 8 KiB are free on")
    room_for(monkeypatch, 1 << 30, files=3)
    refusal(flowers, "needs 12 files, and there is room for 3")


def test_variables_are_those_of_the_node(
    flowers: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = flowers.model_copy(update={"stage": "$NODE_DISK/${WHOSE}"})
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    monkeypatch.delenv("WHOSE", raising=False)
    refusal(config, r"data.stage=\$NODE_DISK/\$\{WHOSE\}, but WHOSE is not set on ", ConfigError)
    with pytest.raises(ConfigError, match="WHOSE is not set on"):
        train(run(tmp_path, "run", "$WHOSE"))
    monkeypatch.setenv("WHOSE", "mine")
    assert local_of(config).is_relative_to(tmp_path / "disk" / "mine")
    assert config.stage == "$NODE_DISK/${WHOSE}"
    with pytest.raises(ConfigError, match="quote a variable"):
        DataConfig(stage="")  # is what the shell made of one


def test_links_are_what_they_were(tmp_path: Path) -> None:
    """Links within a split count once, links between splits are told of, what lies outside is copied."""
    root = write_classes(tmp_path / "flowers", ["a", "b"])
    outside = tmp_path / "outside"
    write_images(outside, 2, first=500)
    (root / "train" / "c").symlink_to(outside)
    (root / "train" / "a" / "again.png").symlink_to("000.png")
    (root / "val" / "a" / "trained.png").symlink_to(root / "train" / "a" / "001.png")
    (root / "val" / "b" / "hard.png").hardlink_to(root / "val" / "b" / "110.png")
    (root / "val" / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "val" / "b" / "pipe.png")
    config = settings(root, tmp_path / "disk")
    local = stage(config)
    assert seen(local, "train") == seen(config, "train")
    names = images_of(local, "train")[1]
    assert "/train/c/500.png" in names
    assert "/train/a/again.png" not in names
    assert not (Path(str(local.data_path)) / "train" / "c" / "500.png").is_symlink()
    assert images_of(local, "validation")[1] == images_of(config, "validation")[1]
    with pytest.raises(DataError, match="1 image of split 'validation' is an image of split 'train'"):
        check_apart(local, open_dataset(local, "train", 3, training=False))


def members(*folders: str) -> dict[str, bytes]:
    return {f"{folder}/{number}.png": encoded(number) for number, folder in enumerate(folders * 2)}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


WRITERS = {"tar": write_tar, "zip": write_zip}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("above", ["", "./", "flowers/v2/"])
def test_an_archive_of_splits_is_unpacked(tmp_path: Path, ending: str, above: str) -> None:
    files = members(*(f"{above}{split}/{name}" for split in ("train", "val") for name in ("b10", "b9")))
    files[f"{above}train/readme.txt"] = b"no image"
    files["__MACOSX/train/b9/._1.png"] = b"of a Mac"
    config = settings(WRITERS[ending](tmp_path / f"flowers.{ending}", files), tmp_path / "disk")
    check_dataset(config)
    with pytest.raises(DataError, match="is unpacked when the run begins"):
        open_dataset(config, "train", 3, training=False)
    local = stage(config)
    for split in ("train", "validation"):
        source = open_dataset(local, split, 3, training=False)
        assert isinstance(source, FolderImages)
        assert source.class_names == ("b9", "b10")
        assert len(source) == 4
    assert not list(Path(str(local.data_path)).rglob("*.txt"))
    assert stage(config) == local
    with pytest.raises(DataError, match=r"flowers\.\w+ must be unpacked .* set data\.stage"):
        check_dataset(DataConfig(data_path=str(config.data_path)))


def test_a_damaged_or_hostile_archive_is_named_and_writes_nothing_elsewhere(
    tmp_path: Path,
) -> None:
    nested, image = f"train/a/{'b/' * 1500}0.png", {"train/a/0.png": encoded(0)}
    deep = r"unpacked: 0\.png lies in 1502 folders, and at most 100 are taken$"
    nameless = write_zip(tmp_path / "nameless.zip", members("train/a", "train/b"))
    nameless.write_bytes(nameless.read_bytes().replace(b"train/b/1.png", b"\0rain/b/1.png"))
    gone = write_tar(tmp_path / "gone.tar", image, link("train/a/1.png", "train/a/gone.png"))
    negative = write_tar(tmp_path / "negative.tar", image)
    set_size_below_zero(negative)
    cases = {
        nameless: "cannot be unpacked",
        negative: "cannot be unpacked",  # and no loop
        gone: r"train/a/1\.png is a link to train/a/gone\.png, which is not before it",
    }
    for ending, write in WRITERS.items():
        damaged = tmp_path / f"damaged.{ending}"
        damaged.write_bytes(b"not an archive" * 100)
        cases[damaged] = rf"data.data_path={damaged} cannot be unpacked"
        cases[write(tmp_path / f"deep.{ending}", {nested: encoded(0)})] = deep
    for number, name in enumerate(("../outside/train/a/1.png", "/etc/train/a/1.png")):
        outside = write_zip(tmp_path / f"outside{number}.zip", {**image, name: encoded(1)})
        cases[outside] = "cannot be unpacked: .* lies outside of the archive"
    for path, message in cases.items():
        refusal(settings(path, tmp_path / "disk"), message)
    assert not list((tmp_path / "disk").rglob("*.png"))


def set_size_below_zero(path: Path) -> None:
    """Change the size of the first image of a tar file."""
    content = bytearray(path.read_bytes())
    place = content.index(b"train/a/0.png")
    content[place + 124 : place + 136] = b"\xff" * 10 + b"\xfe\x00"
    header = content[place : place + 512]
    header[148:156] = b" " * 8
    content[place + 148 : place + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(content)


def test_shards_are_copied_with_what_describes_them(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    config = settings(root, tmp_path / "disk", dataset="wds/shards", num_classes=2)

    def streamed(data: DataConfig) -> list[tuple[bytes, int]]:
        stream = open_dataset(data, "train", 3, training=True, seed=3)
        samples = [stream.read(index) for index in range(len(stream))]  # type: ignore[arg-type, union-attr]
        return [(image.tobytes(), label) for image, label in samples]

    local = stage(config)
    assert streamed(local) == streamed(config)
    assert len(streamed(local)) >= 8


def test_a_saved_table_is_copied_and_read_from_there(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": encoded(n), "path": None} for n in range(4)], "label": [0, 1, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(dataset=f"hfds/{tmp_path / 'saved'}", stage=str(tmp_path / "disk"))
    local = stage(config)
    assert local.dataset.startswith(f"hfds/{tmp_path / 'disk'}")
    assert [row[1:] for row in seen(local, "train")] == [row[1:] for row in seen(config, "train")]


def test_linked_folders_of_other_data_sets_are_copied_and_loops_are_not(tmp_path: Path) -> None:
    root = tmp_path / "cifar"
    (root / "z").mkdir(parents=True)
    (root / "z" / "batch").write_bytes(b"12345")
    (root / "a").symlink_to("z")
    (root / "z" / "loop").symlink_to(root)
    local = local_of(settings(root, tmp_path / "disk", dataset="torch/cifar10"))
    assert (local / "a" / "batch").read_bytes() == (local / "z" / "batch").read_bytes() == b"12345"
    assert sorted(path.name for path in local.iterdir()) == ["a", "z"]


def test_what_cannot_be_staged_is_refused(flowers: DataConfig, tmp_path: Path) -> None:
    for dataset in ("digits", "hfids/some/name", "hfds/some/name"):
        config = DataConfig(dataset=dataset, stage=str(tmp_path / "disk"))
        refusal(config, f"data.dataset={dataset} has no files that could be copied", ConfigError)
    write_images(tmp_path / "others" / "a", 1)
    for split in ("../others", "/etc"):
        config = flowers.model_copy(update={"val_split": split})
        refusal(config, f"data.val_split={split} lies outside of data.data_path")
    root = write_classes(tmp_path / "tests", ["a"], ("train", "test"))
    with pytest.raises(
        DataError, match=r"no folder for split 'validation', only train, test; data\.val_split"
    ):
        open_dataset(stage(settings(root, tmp_path / "disk")), "validation", 3, training=False)


def test_a_file_that_changes_meanwhile_ends_it(flowers: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_source(flowers)
    (Path(str(flowers.data_path)) / "train" / "a" / "000.png").write_bytes(b"other")
    monkeypatch.setattr(staging, "find_source", lambda config: found)
    refusal(flowers, "bytes and 5 when it was copied")


def test_a_stop_signal_ends_the_copying_and_leaves_nothing(flowers: DataConfig, tmp_path: Path) -> None:
    asked = iter([False, False])
    with pytest.raises(StagingStoppedError):
        stage(flowers, lambda: next(asked, True))
    assert copies(tmp_path / "disk") == []
    assert stage(flowers).stage is None


def test_long_copies_are_told_of(
    flowers: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(staging, "now", lambda: float(next(seconds)))
    stage(flowers)
    lines = [record.getMessage() for record in caplog.records if " % of 48 KiB" in record.getMessage()]
    assert len(lines) >= 2
    assert "left" in lines[0]


def test_processes_that_come_at_once_share_one_copy(
    flowers: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = staging.copy

    def note(name: str, word: object) -> None:
        with (tmp_path / name).open("a") as file:
            file.write(f"{word}\n")

    def noted(*arguments: Any) -> None:
        note("copies", "copied")
        real(*arguments)

    monkeypatch.setattr(staging, "copy", noted)
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=lambda: note("places", stage(flowers).data_path)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    places = (tmp_path / "places").read_text().split()
    assert (len(places), len(set(places))) == (3, 1)
    assert (tmp_path / "copies").read_text().split() == ["copied"]


def link(name: str, to: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def room_for(monkeypatch: pytest.MonkeyPatch, size: int, files: int = 1000) -> None:
    real = os.statvfs("/")
    disk = os.statvfs_result([4096, 4096, real[2], real[3], size // 4096, 9, 9, files, *real[8:]])
    monkeypatch.setattr(staging.os, "statvfs", lambda path: disk)


def test_links_in_an_archive_take_the_room_of_their_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = [link(f"train/a/{n}.png", f"./train/a/{n - 1}.png") for n in range(1, 40)]
    other = link("train/b/1.png", "../a/0.png", tarfile.SYMTYPE)
    path = write_tar(tmp_path / "flowers.tar", {"train/a/0.png": encoded(0)}, *links, other)
    config = settings(path, tmp_path / "disk")
    room_for(monkeypatch, 39 * 4096)
    refusal(config, "the copy needs 160 KiB, and 156 KiB are free")
    room_for(monkeypatch, 40 * 4096, files=39)
    refusal(config, "the copy needs 40 files, and there is room for 39")
    room_for(monkeypatch, 40 * 4096, files=40)
    images = list(local_of(config).rglob("*.png"))
    assert len({image.read_bytes() for image in images}) == 1
    assert len(images) == 40


def test_holes_in_an_archive_take_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hole = tarfile.TarInfo("train/a/1.png")
    hole.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2 << 30)}
    hole.size = 512
    path = write_tar(tmp_path / "flowers.tar", {"train/a/0.png": encoded(0)})
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(hole, io.BytesIO(b"0\n".ljust(512, b"\0")))
    room_for(monkeypatch, 1 << 30)
    refusal(settings(path, tmp_path / "disk"), "the copy needs 2 GiB, and 1 GiB are free")


@pytest.mark.parametrize("ending", WRITERS)
def test_an_archive_that_grows_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    path, write, real = tmp_path / f"flowers.{ending}", WRITERS[ending], staging._check_room
    write(path, members("train/a"))

    def grown(*arguments: Any) -> None:
        real(*arguments)
        write(path, members("train/a", "train/b"))

    monkeypatch.setattr(staging, "_check_room", grown)
    refusal(settings(path, tmp_path / "disk"), "holds more than when it was counted")


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_the_folder_of_copies_is_nobody_elses(flowers: DataConfig, tmp_path: Path, kind: str) -> None:
    own = tmp_path / "disk" / f"graftvit-data-{os.getuid()}"
    own.parent.mkdir()
    if kind == "link":
        (tmp_path / "victim").mkdir()
        own.symlink_to(tmp_path / "victim")
    elif kind == "file":
        own.touch()
    else:
        own.mkdir()
        own.chmod(0o777)
    for refused in (stage, partial(check_stage, here=True)):
        with pytest.raises(DataError, match=f"data.stage: {own} is not a folder that only this user writes"):
            refused(flowers)
    assert not list(tmp_path.glob("victim/*"))


def run(root: Path, name: str, stage: str | None, **engine: Any) -> RunConfig:
    if not (root / "images").exists():
        class_folder(root / "images", train=24)
        make_teacher(root / "teacher", classes=2)
    data = {"dataset": "", "data_path": str(root / "images"), "train_samples": None, "batch_size": 8}
    return config(root / name, root / "teacher", data={**data, "stage": stage}, engine=engine)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that data sets are opened at."""
    found: list[str] = []
    real = loaders.open_dataset

    def noted(data: Any, *arguments: Any, **keywords: Any) -> Any:
        found.append(str(data.data_path))
        return real(data, *arguments, **keywords)

    monkeypatch.setattr(loaders, "open_dataset", noted)
    return found


@pytest.mark.parametrize(("before", "after"), [("$DISK", None), (None, "$DISK"), ("$DISK", "$DISK/other")])
def test_a_run_goes_on_with_or_without_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], before: str | None, after: str | None
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    train(run(tmp_path, "plain", None))
    opened.clear()
    with terminated_after(4):
        assert train(run(tmp_path, "cut", before)).signal == signal.SIGTERM
    early_signals.received.clear()
    kept = parse_yaml((tmp_path / "cut" / "config.yaml").read_text())["data"]
    assert (kept["data_path"], kept["stage"]) == (str(tmp_path / "images"), before)
    assert all(path.startswith(str(tmp_path / "disk")) == (before is not None) for path in opened)
    opened.clear()
    assert train(run(tmp_path, "cut", after)).finished
    assert all(path.startswith(str(tmp_path / "disk")) == (after is not None) for path in opened)
    assert differences(tmp_path / "plain", tmp_path / "cut") == []


def test_a_signal_while_it_copies_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = staging._copy

    def stopped(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        real(*arguments)

    monkeypatch.setattr(staging, "_copy", stopped)
    result = train(run(tmp_path, "run", str(tmp_path / "disk")))
    assert (result.signal, result.finished, result.steps) == (signal.SIGUSR2, False, 0)
    assert not list((tmp_path / "disk").glob("*/images-*"))


def test_evaluation_takes_a_copy_where_it_is_asked_for_and_not_because_the_run_had_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    train(run(tmp_path, "run", "$DISK"))
    monkeypatch.delenv("DISK")
    monkeypatch.setattr("graftvit.launch.evaluation.create_eval_loader", loaders.create_eval_loader)
    shown = []
    for words in ([], ["--stage", str(tmp_path / "elsewhere")]):
        opened.clear()
        assert main(["evaluate", str(tmp_path / "run"), "--device", "cpu", *words]) == 0
        shown.append(capsys.readouterr().out)
        assert all(path.startswith(str(tmp_path / "elsewhere")) == bool(words) for path in opened)
        assert opened
    assert shown[0] == shown[1]


def test_one_process_of_a_node_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks 0 and 2 are on one node, ranks 1 and 3 on another."""
    names = ["n1", "n2", "n1", "n2"]
    data = run(tmp_path, "run", str(tmp_path / "disk")).data
    for rank, first in enumerate([0, 1, 0, 1]):
        made = [data.model_copy(update={"data_path": f"/disk/of/{name}"}) for name in names]
        answers = iter([[("host", name) for name in names], [None] * 4, made])
        monkeypatch.setattr(together, "gather", lambda item, group, answers=answers: next(answers))
        monkeypatch.setattr(together, "raise_together", lambda error, group, answers=answers: next(answers))
        monkeypatch.setattr(together.dist, "get_rank", lambda rank=rank: rank)
        copied: list[int] = []
        monkeypatch.setattr(
            together, "_try", lambda config, stopped, rank=rank, copied=copied: (copied.append(rank), None)
        )
        found = together._on_each_node(data, None, lambda: False)  # type: ignore[arg-type]
        assert found.data_path == f"/disk/of/{names[rank]}"
        assert copied == ([rank] if rank == first else [])
