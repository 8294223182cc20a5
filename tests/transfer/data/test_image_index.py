"""A folder of images is listed once: the list is kept, given to other processes, and never older than the folders."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import image_folder
from graftvit.transfer.data.datasets import folders_of, open_dataset
from graftvit.transfer.data.image_folder import (
    FolderImages,
    Found,
    find_again,
    find_images,
    keep_index,
    listed,
    natural_order,
    open_image,
    pack_lists,
    unpack_lists,
)
from graftvit.transfer.engine.parallel import list_together
from support.files.data_sets import write_classes
from support.files.irregular_files import KINDS, irregular

NAMES = (
    "a",
    "b10",
    "b9",
    "more/deep",
    b"caf\xe9".decode(errors="surrogateescape"),
    "line\nbreak",
    "1²3",
    "ä ö",
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep lists of folders that were changed just now."""
    monkeypatch.setattr(image_folder, "SETTLING", -(10**15))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A training folder of two classes, and one deeper down."""
    for name in ("cat", "dog", "deep/ant"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "set" / name / f"{number}.png").touch()
    return tmp_path / "set"


def kept(root: Path, index: Path) -> Found:
    """Return the list as a next start has it."""
    (found,) = find_again([root], index)
    keep_index([found], index)
    return found


def test_a_list_comes_back_as_it_was_with_names_of_every_kind(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for file in NAMES:
            (root / name / f"{Path(file).name}.jpg").touch()
    found = find_images(root)
    (again,) = unpack_lists(pack_lists([found]))
    assert (again.root, again.files, again.seen, again.folders) == (
        root,
        found.files,
        found.seen,
        found.folders,
    )
    (elsewhere,) = unpack_lists(pack_lists([found]), [tmp_path / "other"])
    assert elsewhere.files == [str(tmp_path / "other" / Path(path).relative_to(root)) for path in found.files]
    first, second = FolderImages(found, "RGB"), FolderImages(elsewhere, "RGB")
    assert (first.class_names, first.targets) == (second.class_names, second.targets)


def test_names_that_differ_in_case_alone_have_one_order() -> None:
    expected = ["A1", "a1", "a2", "a10", "B", "b"]
    for names in (["b", "A1", "a1", "a10", "a2", "B"], ["B", "a2", "a10", "a1", "A1", "b"]):
        assert sorted(names, key=natural_order) == expected


def test_a_start_with_an_index_looks_through_no_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "images.index"
    first = kept(root, index)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", None)
        again = kept(root, index)
    assert (first.kept, again.kept) == (False, True)
    assert (again.files, again.folders) == (first.files, first.folders)


CHANGES: dict[str, Callable[[Path], object]] = {
    "image added": lambda root: (root / "cat" / "9.png").touch(),
    "image removed": lambda root: (root / "cat" / "1.png").unlink(),
    "image renamed": lambda root: (root / "cat" / "1.png").rename(root / "cat" / "9.png"),
    "image moved": lambda root: (root / "cat" / "1.png").rename(root / "dog" / "9.png"),
    "image became a folder": lambda root: (
        (root / "cat" / "1.png").unlink(),
        (root / "cat" / "1.png").mkdir(),
    ),
    "class added": lambda root: shutil.copytree(root / "cat", root / "emu"),
    "class removed": lambda root: shutil.rmtree(root / "cat"),
    "class renamed": lambda root: (root / "cat").rename(root / "lion"),
    "classes exchanged": lambda root: exchange(root / "cat", root / "dog"),
    "deep image added": lambda root: (root / "deep" / "ant" / "9.png").touch(),
    "deep folder": lambda root: shutil.copytree(root / "dog", root / "cat" / "more"),
    "folder linked": lambda root: (root / "hound").symlink_to(root.parent / "store"),
    "image linked": lambda root: (root / "cat" / "9.png").symlink_to(root / "dog" / "1.png"),
}


def exchange(one: Path, other: Path) -> None:
    (one / "0.png").unlink()  # or nothing shows which is which
    aside = one.with_name("aside")
    one.rename(aside), other.rename(one), aside.rename(other)


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changed_is_listed_again(change: str, root: Path, tmp_path: Path) -> None:
    index = tmp_path / "images.index"
    shutil.copytree(root / "dog", tmp_path / "store")
    kept(root, index)
    CHANGES[change](root)
    found = kept(root, index)
    assert not found.kept
    assert found.files == find_images(root).files
    assert FolderImages(found, "RGB").class_names == find_images(root).class_names()


def test_a_link_to_a_folder_that_leads_elsewhere_now(root: Path, tmp_path: Path) -> None:
    """Neither the folder with the link changed nor the link: the folder on its way did."""
    index = tmp_path / "images.index"
    for name, images in (("old", ["0.png"]), ("new", ["0.png", "1.png"])):
        (tmp_path / name / "fox").mkdir(parents=True)
        for image in images:
            (tmp_path / name / "fox" / image).touch()
    (tmp_path / "current").symlink_to("old")
    (root / "fox").symlink_to(tmp_path / "current" / "fox")
    assert len(kept(root, index).files) == 10
    assert kept(root, index).kept
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("new")
    assert len(kept(root, index).files) == 11


@pytest.mark.parametrize("target", ["image", "nothing", "folder later"])
def test_a_list_with_links_that_may_change_unseen_is_not_kept(
    target: str, root: Path, tmp_path: Path
) -> None:
    index = tmp_path / "images.index"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "0.png").touch()
    leads = {"image": "store/0.png", "nothing": "absent.png", "folder later": "later"}[target]
    (root / "cat" / ("link" if target == "folder later" else "link.png")).symlink_to(tmp_path / leads)
    kept(root, index)
    assert not index.exists()
    if target == "folder later":
        (tmp_path / "store").rename(tmp_path / "later")
        assert len(kept(root, index).files) == 10


def test_a_folder_that_cannot_be_read_is_tried_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, real = tmp_path / "images.index", os.scandir

    def refused(path: str | Path) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refused)
        assert len(kept(root, index).files) == 6
    assert len(kept(root, index).files) == 9


def test_a_folder_that_has_just_changed_is_not_trusted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change in the same tick of the file system's clock would leave its times as they are."""
    monkeypatch.setattr(image_folder, "SETTLING", 10 * 10**9)
    kept(root, tmp_path / "images.index")
    assert not (tmp_path / "images.index").exists()


def test_a_change_while_the_folder_is_read_is_seen_at_the_next_start(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, real = tmp_path / "images.index", os.scandir

    def changing(path: str | Path) -> object:
        entries = real(path)
        if str(path).endswith("cat"):
            (root / "dog" / "late.png").touch()
            (root / "cat" / "late.png").touch()
        return entries

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", changing)
        kept(root, index)
    assert len(kept(root, index).files) == 11


def damage(data: bytes) -> list[bytes]:
    cut = [data[: len(data) * part // 7] for part in range(7)]
    turned = [
        data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :] for place in range(0, len(data), 7)
    ]
    bomb = zlib.compress(b"[" * 10**7)
    return [*cut, *turned, b"{}", os.urandom(50), data[::-1], bomb]


def test_a_damaged_index_is_left_alone_and_the_folder_is_listed(root: Path, tmp_path: Path) -> None:
    index = tmp_path / "images.index"
    files = kept(root, index).files
    for data in damage(index.read_bytes()):
        index.write_bytes(data)
        (found,) = find_again([root], index)
        assert found.files == files


def test_an_index_without_end_is_not_read(root: Path, tmp_path: Path) -> None:
    with (tmp_path / "images.index").open("wb") as file:
        file.truncate(5 << 30)
    assert len(find_again([root], tmp_path / "images.index")[0].files) == 9


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_index_that_is_no_file(kind: str, root: Path, tmp_path: Path) -> None:
    irregular(kind, tmp_path / "images.index")
    assert len(find_again([root], tmp_path / "images.index")[0].files) == 9


@pytest.mark.parametrize("path", ["../secret/a.png", "/etc/a.png", "cat/../../a.png", "cat/x/../a.png", ".."])
def test_an_index_leads_to_no_file_outside(path: str, root: Path) -> None:
    found = find_images(root)
    found.files.append(f"{root}/{path}")
    with pytest.raises(DataError):
        unpack_lists(pack_lists([found]), [root.parent / "other"])


def test_a_death_while_the_index_is_written_loses_nothing(root: Path, tmp_path: Path) -> None:
    index = tmp_path / "images.index"
    kept(root, index)
    before = index.read_bytes()
    (root / "cat" / "9.png").touch()
    child = os.fork()
    if child == 0:  # dies between the writing and the renaming
        Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign,return-value]
        kept(root, index)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert index.read_bytes() == before
    assert len(kept(root, index).files) == 10
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_run_lists_what_open_dataset_looks_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_classes(tmp_path / "set", ["cat", "dog"], count=2)
    config = DataConfig(data_path=str(root))
    roots = folders_of(config, [config.train_split, config.val_split, None])
    assert [each.name for each in roots] == ["train", "val"]
    with listed([find_images(each) for each in roots]), monkeypatch.context() as patched:
        patched.setattr(os, "scandir", None)
        for split in (config.train_split, str(config.val_split)):
            assert len(open_dataset(config, split, 3, training=True)) > 0  # type: ignore[arg-type]
    assert folders_of(DataConfig(dataset="digits"), ["train"]) == []
    assert folders_of(DataConfig(data_path=str(tmp_path / "absent")), ["train"]) == []
    flat = DataConfig(data_path=str(root / "train"))
    assert folders_of(flat, [flat.train_split, flat.val_split]) == [root / "train"]


# Opening an image.


def test_an_image_is_opened_by_one_open_and_one_fstat(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_classes(tmp_path / "images", ["cat"], count=1) / "train" / "cat" / "000.png"
    asked: list[str] = []

    def noted(name: str) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, **keys: (asked.append(name), real(*given, **keys))[1])

    for name in ("open", "fstat", "stat", "lstat", "readlink"):
        noted(name)
    with open_image(path) as image:
        image.load()
    assert asked == ["open", "fstat"]


def test_a_large_image_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_classes(tmp_path / "images", ["cat"], count=1) / "train" / "cat" / "000.png"
    monkeypatch.setattr(image_folder, "WHOLE", 10)
    monkeypatch.setattr(image_folder, "_read", None)
    with open_image(str(path)) as image:
        image.load()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_no_regular_file_is_no_image(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=KINDS[kind]), open_image(irregular(kind, tmp_path / "it.png")):
        pass


# Several processes.

FORK = multiprocessing.get_context("fork")


def list_as(rank: int, folder: Path, data: str) -> None:
    group = f"file://{folder / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    world = torch.distributed.group.WORLD
    if rank:
        os.scandir = None  # type: ignore[assignment]
    try:
        found = list_together(DataConfig(data_path=data), ["train", "val"], world, folder / "images.index")
        text = "\0".join(path[len(data) :] for each in found for path in each.files)
    except DataError:
        text = "refused"
    (folder / f"rank-{rank}").write_bytes(os.fsencode(text))


def lists_of(folder: Path, *data: Path) -> list[bytes]:
    ranks = [FORK.Process(target=list_as, args=(rank, folder, str(data[rank]))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [(folder / f"rank-{rank}").read_bytes() for rank in range(2)]


def test_ranks_have_the_list_of_the_first_whatever_they_see(tmp_path: Path) -> None:
    one, other = (write_classes(tmp_path / name, ["cat", "dog"], count=2) for name in ("one", "other"))
    (one / "train" / b"caf\xe9".decode(errors="surrogateescape")).mkdir()
    (one / "train" / b"caf\xe9".decode(errors="surrogateescape") / "1.png").touch()
    (other / "train" / "cat" / "more.png").touch()
    first, second = lists_of(tmp_path, one, other)
    assert first == second
    assert b"caf\xe9/1.png" in first
    assert b"more" not in first


def test_ranks_that_see_other_splits_are_refused_together(tmp_path: Path) -> None:
    one, other = (write_classes(tmp_path / name, ["cat", "dog"], count=2) for name in ("one", "other"))
    shutil.rmtree(other / "val")
    assert lists_of(tmp_path, one, other) == [b"refused", b"refused"]
