"""A data set on a node's own disk: what is copied, once, checked, and read as the source is."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import check_apart, check_dataset, open_dataset
from graftvit.transfer.data.image_folder import FolderImages
from graftvit.transfer.staging import stage as copying
from graftvit.transfer.staging import stage as staging
from graftvit.transfer.staging.stage import StagingStoppedError, check_stage, find_source, stage
from support.files.data_sets import encoded, write_classes, write_images, write_shards, write_tar


def settings(path: Path, disk: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"data_path": str(path), "stage": str(disk), **more})


def seen(config: DataConfig, split: str) -> list[tuple[str, int, bytes]]:
    """Name, label and pixels of each image, in the order of the data set."""
    source = open_dataset(config, split, 3, training=False)
    root = str(config.data_path)
    found = []
    for index in range(len(source)):  # type: ignore[arg-type]
        image, label = source.read(index)  # type: ignore[union-attr]
        name = source.path(index).removeprefix(root)  # type: ignore[union-attr]
        found.append((name, label, image.tobytes()))
    return found


def places(config: DataConfig, split: str) -> list[str]:
    """Names of the images, readable or not."""
    source = open_dataset(config, split, 3, training=False)
    root = str(config.data_path)
    return [source.path(index).removeprefix(root) for index in range(len(source))]  # type: ignore[union-attr,arg-type]


def copies(disk: Path) -> list[Path]:
    return [path for path in disk.glob("graftvit-data-*/*") if not path.name.startswith(".")]


def test_a_folder_is_copied_once_and_reads_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_classes(tmp_path / "flowers", ["rose", "daisy10", "daisy9"])
    write_images(root / "train" / "rose", 1, first=77, suffix="PNG")
    (root / "notes.txt").write_text("not an image")
    config = settings(root, tmp_path / "disk")
    local = stage(config)
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


def test_a_source_that_changed_is_copied_anew(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "flowers", ["a", "b"])
    config = settings(root, tmp_path / "disk")
    first = stage(config)
    os.utime(root / "train" / "a" / "000.png", ns=(1, 1))
    second = stage(config)
    write_images(root / "val" / "b", 1, first=900)
    third = stage(config)
    assert len({first.data_path, second.data_path, third.data_path}) == 3
    assert seen(third, "validation") == seen(config, "validation")


@pytest.mark.parametrize("damage", ["removed", "shortened", "marker", "partial"])
def test_what_was_cut_short_is_made_again(tmp_path: Path, damage: str) -> None:
    root = write_classes(tmp_path / "flowers", ["a", "b"])
    config = settings(root, tmp_path / "disk")
    local = Path(str(stage(config).data_path))
    image = next(local.rglob("*.png"))
    if damage == "removed":
        image.unlink()
    elif damage == "shortened":
        image.write_bytes(image.read_bytes()[:-1])
    elif damage == "marker":
        local.with_name(f".{local.name}.json").unlink()
    else:
        local.rename(local.with_name(f".{local.name}.partial"))
        image = local.with_name(f".{local.name}.partial") / image.relative_to(local)
        image.unlink()
    again = stage(config)
    assert seen(again, "train") == seen(config, "train")
    assert seen(again, "validation") == seen(config, "validation")
    assert not list(local.parent.glob("*.partial"))


def test_a_full_disk_is_told_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_classes(tmp_path / "flowers", ["a"])
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:3], real[3], 2, *real[5:]])
    monkeypatch.setattr(staging.os, "statvfs", lambda path: full)
    with pytest.raises(
        DataError, match=r"cannot hold .*flowers: the copy needs 24 KiB, and 8 KiB are free on"
    ):
        stage(settings(root, tmp_path / "disk"))
    no_files = os.statvfs_result([*real[:5], 9, 9, 3, *real[8:]])
    monkeypatch.setattr(staging.os, "statvfs", lambda path: no_files)
    with pytest.raises(DataError, match="needs 6 files, and there is room for 3"):
        stage(settings(root, tmp_path / "disk"))
    assert copies(tmp_path / "disk") == []


def test_variables_are_those_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_classes(tmp_path / "flowers", ["a"])
    config = settings(root, Path("$NODE_DISK/${WHOSE}"))
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    monkeypatch.delenv("WHOSE", raising=False)
    with pytest.raises(ConfigError, match=r"data.stage=\$NODE_DISK/\$\{WHOSE\}, but WHOSE is not set on "):
        stage(config)
    monkeypatch.setenv("WHOSE", "mine")
    assert Path(str(stage(config).data_path)).is_relative_to(tmp_path / "disk" / "mine")
    assert config.stage == "$NODE_DISK/${WHOSE}"


def test_an_empty_folder_is_what_the_shell_made_of_a_variable() -> None:
    with pytest.raises(ValueError, match="quote a variable"):
        DataConfig(stage="")


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
    assert "/train/c/500.png" in places(local, "train")
    assert "/train/a/again.png" not in places(local, "train")
    assert not (Path(str(local.data_path)) / "train" / "c" / "500.png").is_symlink()
    assert places(local, "validation") == places(config, "validation")
    with pytest.raises(DataError, match="1 image of split 'validation' is an image of split 'train'"):
        check_apart(local, open_dataset(local, "train", 3, training=False))


def test_a_split_that_is_not_there_is_told_as_without_staging(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "flowers", ["a"], ("train", "test"))
    config = settings(root, tmp_path / "disk")
    with pytest.raises(
        DataError, match=r"has no folder for split 'validation', only train, test; data\.val_split"
    ):
        open_dataset(stage(config), "validation", 3, training=False)


def test_a_folder_without_splits_is_copied_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "photos" / name, 2)
    config = settings(tmp_path / "photos", tmp_path / "disk")
    assert seen(stage(config), "train") == seen(config, "train")


def members(*folders: str) -> dict[str, bytes]:
    return {f"{folder}/{number}.png": encoded(number) for number, folder in enumerate(folders * 2)}


def test_a_plain_tar_is_read_in_the_same_order(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "flowers.tar", members("x/b10", "x/b9", "y/a"))
    config = settings(path, tmp_path / "disk")
    local = stage(config)
    assert Path(str(local.data_path)).name == "flowers.tar"
    assert [entry[1:] for entry in seen(local, "train")] == [entry[1:] for entry in seen(config, "train")]


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.parametrize("above", ["", "./", "flowers/v2/"])
def test_an_archive_of_splits_is_unpacked(tmp_path: Path, ending: str, above: str) -> None:
    files = members(*(f"{above}{split}/{name}" for split in ("train", "val") for name in ("b10", "b9")))
    files[f"{above}train/readme.txt"] = b"no image"
    files["__MACOSX/train/b9/._1.png"] = b"of a Mac"
    path = tmp_path / f"flowers.{ending}"
    {"tar": write_tar, "zip": write_zip}[ending](path, files)
    config = settings(path, tmp_path / "disk")
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


def test_a_zip_needs_staging(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "flowers.zip", "w") as archive:
        archive.writestr("train/a/1.png", encoded(1))
    with pytest.raises(DataError, match=r"data.stage unpacks a \.zip file"):
        check_dataset(DataConfig(data_path=str(tmp_path / "flowers.zip")))


@pytest.mark.parametrize("name", ["../outside/train/a/1.png", "/etc/train/a/1.png"])
def test_nothing_is_written_outside_of_the_copy(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("train/a/0.png", encoded(0))
        archive.writestr(name, encoded(1))
    with pytest.raises(DataError, match=r"cannot be unpacked: .* lies outside of the archive"):
        stage(settings(tmp_path / "bad.zip", tmp_path / "disk"))
    assert copies(tmp_path / "disk") == []
    assert not list((tmp_path / "disk").rglob("*.png"))


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_a_damaged_archive_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"flowers.{ending}"
    path.write_bytes(b"not an archive" * 100)
    with pytest.raises(DataError, match=rf"data.data_path={path} cannot be unpacked"):
        stage(settings(path, tmp_path / "disk"))


def test_shards_are_copied_with_what_describes_them(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "shards")
    config = settings(root, tmp_path / "disk", dataset="wds/shards", num_classes=2)

    def streamed(data: DataConfig) -> list[tuple[bytes, int]]:
        stream = open_dataset(data, "train", 3, training=True, seed=3)
        return [(image.tobytes(), int(label)) for image, label in stream]  # type: ignore[union-attr]

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
    local = Path(str(stage(settings(root, tmp_path / "disk", dataset="torch/cifar10")).data_path))
    assert (local / "a" / "batch").read_bytes() == (local / "z" / "batch").read_bytes() == b"12345"
    assert sorted(path.name for path in local.iterdir()) == ["a", "z"]


@pytest.mark.parametrize("dataset", ["digits", "hfids/some/name", "hfds/some/name"])
def test_what_has_no_files_is_refused(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(ConfigError, match=f"data.dataset={dataset} has no files that could be copied"):
        stage(DataConfig(dataset=dataset, stage=str(tmp_path)))


def test_a_file_that_changes_meanwhile_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_classes(tmp_path / "flowers", ["a"])
    config = settings(root, tmp_path / "disk")
    found = find_source(config)
    (root / "train" / "a" / "000.png").write_bytes(b"other")
    monkeypatch.setattr(staging, "find_source", lambda config: found)
    with pytest.raises(DataError, match="bytes and 5 when it was copied"):
        stage(config)
    assert copies(tmp_path / "disk") == []


def test_a_stop_signal_ends_the_copying_and_leaves_nothing(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "flowers", ["a"])
    config = settings(root, tmp_path / "disk")
    asked = iter([False, False])
    with pytest.raises(StagingStoppedError):
        stage(config, lambda: next(asked, True))
    assert copies(tmp_path / "disk") == []
    assert stage(config).stage is None


def test_long_copies_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(copying, "now", lambda: float(next(seconds)))
    root = write_classes(tmp_path / "flowers", ["a"])
    with caplog.at_level(logging.WARNING):
        stage(settings(root, tmp_path / "disk"))
    lines = [record.getMessage() for record in caplog.records if " % of 24 KiB" in record.getMessage()]
    assert len(lines) == 2
    assert "left" in lines[0]


SHARE = """
import sys
from pathlib import Path
from graftvit.transfer.config import DataConfig
from graftvit.transfer.staging import stage as staging
real = staging.copy
def noted(*arguments):
    with Path(sys.argv[3]).open("a") as file:
        file.write("copied\\n")
    real(*arguments)
staging.copy = noted
print(staging.stage(DataConfig(data_path=sys.argv[1], stage=sys.argv[2])).data_path)
"""


@pytest.mark.slow
def test_processes_that_come_at_once_share_one_copy(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "flowers", ["a", "b"])
    words = [sys.executable, "-c", SHARE, str(root), str(tmp_path / "disk"), str(tmp_path / "noted")]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    places = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(places) == 1
    assert (tmp_path / "noted").read_text().split() == ["copied"]


def hostile_tar(path: Path, *entries: tarfile.TarInfo) -> Path:
    """One image, and members of headers alone."""
    write_tar(path, {"train/a/0.png": encoded(0)})
    with tarfile.open(path, "a") as archive:
        for entry in entries:
            archive.addfile(entry)
    return path


def link(name: str, to: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def room_for(monkeypatch: pytest.MonkeyPatch, size: int, files: int = 1000) -> None:
    real = os.statvfs("/")
    disk = os.statvfs_result([4096, 4096, real[2], real[3], size // 4096, 9, 9, files, *real[8:]])
    monkeypatch.setattr(staging.os, "statvfs", lambda path: disk)


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_a_member_in_too_many_folders_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"flowers.{ending}"
    {"tar": write_tar, "zip": write_zip}[ending](path, {f"train/a/{'b/' * 1500}0.png": encoded(0)})
    with pytest.raises(DataError, match=r"unpacked: 0\.png lies in 1502 folders, and at most 100 are taken$"):
        stage(settings(path, tmp_path / "disk"))


def test_a_hard_link_to_nothing_is_named(tmp_path: Path) -> None:
    path = hostile_tar(tmp_path / "flowers.tar", link("train/a/1.png", "train/a/gone.png"))
    with pytest.raises(
        DataError, match=r"train/a/1\.png is a link to train/a/gone\.png, which is not before it"
    ):
        stage(settings(path, tmp_path / "disk"))
    assert copies(tmp_path / "disk") == []


def test_links_in_an_archive_take_the_room_of_their_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = [link(f"train/a/{n}.png", f"./train/a/{n - 1}.png") for n in range(1, 40)]
    path = hostile_tar(tmp_path / "flowers.tar", *links, link("train/b/1.png", "../a/0.png", tarfile.SYMTYPE))
    room_for(monkeypatch, 39 * 4096)
    with pytest.raises(DataError, match="the copy needs 160 KiB, and 156 KiB are free"):
        stage(settings(path, tmp_path / "disk"))
    room_for(monkeypatch, 40 * 4096, files=39)
    with pytest.raises(DataError, match="the copy needs 40 files, and there is room for 39"):
        stage(settings(path, tmp_path / "disk"))
    room_for(monkeypatch, 40 * 4096, files=40)
    local = Path(str(stage(settings(path, tmp_path / "disk")).data_path))
    assert len({image.read_bytes() for image in local.rglob("*.png")}) == 1
    assert len(list(local.rglob("*.png"))) == 40


def test_holes_in_an_archive_take_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hole = tarfile.TarInfo("train/a/1.png")
    hole.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2 << 30)}
    hole.size = 512
    path = tmp_path / "flowers.tar"
    write_tar(path, {"train/a/0.png": encoded(0)})
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(hole, io.BytesIO(b"0\n".ljust(512, b"\0")))
    room_for(monkeypatch, 1 << 30)
    with pytest.raises(DataError, match="the copy needs 2 GiB, and 1 GiB are free"):
        stage(settings(path, tmp_path / "disk"))


def test_a_size_below_zero_is_no_loop(tmp_path: Path) -> None:
    path = hostile_tar(tmp_path / "flowers.tar")
    content = bytearray(path.read_bytes())
    place = 0 if content[:1] == b"t" else content.index(b"train/a/0.png")
    content[place + 124 : place + 136] = b"\xff" * 10 + b"\xfe\x00"
    header = content[place : place + 512]
    header[148:156] = b" " * 8
    content[place + 148 : place + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be unpacked"):
        stage(settings(path, tmp_path / "disk"))


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_an_archive_that_grows_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    path = tmp_path / f"flowers.{ending}"
    written = {"tar": write_tar, "zip": write_zip}[ending]
    written(path, members("train/a"))
    real = staging._check_room

    def grown(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        written(path, members("train/a", "train/b"))

    monkeypatch.setattr(staging, "_check_room", grown)
    with pytest.raises(DataError, match="holds more than when it was counted"):
        stage(settings(path, tmp_path / "disk"))
    assert copies(tmp_path / "disk") == []


def own_folder(disk: Path) -> Path:
    return disk / f"graftvit-data-{os.getuid()}"


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_the_folder_of_copies_is_nobody_elses(tmp_path: Path, kind: str) -> None:
    config = settings(write_classes(tmp_path / "flowers", ["a"]), tmp_path / "disk")
    own = own_folder(tmp_path / "disk")
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
            refused(config)
    assert not list(tmp_path.glob("victim/*"))


def test_the_folder_of_copies_is_for_this_user_alone(tmp_path: Path) -> None:
    config = settings(write_classes(tmp_path / "flowers", ["a"]), tmp_path / "disk")
    own = own_folder(tmp_path / "disk")
    own.mkdir(parents=True, mode=0o755)
    stage(config)
    assert own.stat().st_mode & 0o777 == 0o700
    assert own.parent.stat().st_mode & 0o077


@pytest.mark.parametrize("split", ["../others", "/etc"])
def test_a_split_elsewhere_is_not_copied(tmp_path: Path, split: str) -> None:
    root = write_classes(tmp_path / "flowers", ["a"])
    write_images(tmp_path / "others" / "a", 1)
    with pytest.raises(DataError, match=f"data.val_split={split} lies outside of data.data_path"):
        stage(settings(root, tmp_path / "disk", val_split=split))
    assert copies(tmp_path / "disk") == []


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    root = write_classes(tmp_path / ("ö" * 120), ["a"])
    assert stage(settings(root, tmp_path / "disk")).stage is None


def test_an_archive_with_a_member_without_a_name_is_damaged(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "flowers.zip", members("train/a", "train/b"))
    path.write_bytes(path.read_bytes().replace(b"train/b/1.png", b"\0rain/b/1.png"))
    with pytest.raises(DataError, match=r"flowers\.zip cannot be unpacked"):
        stage(settings(path, tmp_path / "disk"))
