"""Shards: the order of samples, their indexes, ranges from disks and servers, ranks and resumed epochs."""

from __future__ import annotations

import importlib.util
import pickle
import random
import shutil
import socket
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import shard_index, shard_places, shards
from graftvit.transfer.data.loaders import create_eval_loader, create_train_loader
from graftvit.transfer.data.loading import SourceLostError
from graftvit.transfer.data.sampler import WINDOW, Permutation, WindowOrder
from graftvit.transfer.data.shard_index import ShardIndex, find_index
from graftvit.transfer.data.shards import ShardImages, expand, index_split
from hypothesis import given, settings
from hypothesis import strategies as some
from support.files.data_sets import encoded, write_tar

SPEC = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
COUNTS = (5, 1, 7, 3, 4, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_places, "WAIT_S", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Shards of unequal sizes; a sample's label is its number."""
    folder, number = tmp_path / "shards", 0
    folder.mkdir()
    for shard, count in enumerate(COUNTS):
        members: dict[str, bytes] = {}
        for _ in range(count):
            members[f"in/{number:03d}.jpg"] = encoded(number, "JPEG")
            members[f"in/{number:03d}.seg.bin"] = b"x" * number
            members[f"in/{number:03d}.cls"] = str(number).encode()
            number += 1
        write_tar(folder / f"s-{shard}.tar", members)
    return folder


def config(root: object, **keys: Any) -> DataConfig:
    pattern = "s-{0..5}.tar"
    common = {"dataset": "wds/s", "data_path": str(root), "train_split": pattern, "val_split": pattern}
    return DataConfig(**common | {"num_classes": 24, "batch_size": 2, "workers": 0} | keys)


def trained(
    root: object, epoch: int = 1, start: int = 0, world: int = 1, each: int = 12, **keys: Any
) -> list[Any]:
    """The batches of all ranks in the order of their positions, from global position `start`: (images, labels)."""
    of_ranks = []
    for rank in range(world):
        settings = config(root, batch_size=each // world, **keys)
        loader = create_train_loader(settings, SPEC, seed=7, rank=rank, world_size=world)
        of_ranks.append(list(loader.epoch_from(epoch, start)))
    return [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]).tolist())
        for parts in zip(*of_ranks, strict=True)
    ]


# The order.


@given(size=some.integers(1, 3000), seed=some.integers(0, 2**40), epoch=some.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_permutation_has_each_number_once(size: int, seed: int, epoch: int) -> None:
    found = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_permutations_differ_by_seed_and_epoch_and_leave_nothing_in_its_place() -> None:
    places = np.arange(10_000)
    found = [Permutation(10_000, *parts)(places) for parts in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (found[first] == found[second]).mean() < 0.002
    for each in found:
        assert abs(np.corrcoef(each, places)[0, 1]) < 0.05
        assert abs(np.corrcoef(each[1:], each[:-1])[0, 1]) < 0.05


@given(counts=some.lists(some.integers(0, 9), min_size=1, max_size=60), epoch=some.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_each_sample_once_and_mixes_a_window(counts: list[int], epoch: int) -> None:
    sizes = np.array(counts, dtype=np.int64)
    order = WindowOrder(sizes, 0, epoch)
    whole = order[: len(order)]
    assert sorted(whole) == list(range(sum(counts)))
    pieces = [order[start : start + 7] for start in range(0, len(order), 7)]
    assert [number for piece in pieces for number in piece] == list(whole)
    shard_of = np.repeat(np.arange(len(counts)), sizes)
    seen = shard_of[whole]
    for begin, end in zip([0, *order._windows[:-1]], order._windows, strict=True):
        assert len(set(seen[begin:end])) <= WINDOW


def test_repeats_show_a_sample_several_times_in_a_row() -> None:
    once, thrice = WindowOrder(np.array([5, 4]), 0, 0), WindowOrder(np.array([5, 4]), 0, 0, 3)
    assert list(thrice[:9]) == [number for number in once[:3] for _ in range(3)]


def test_memory_does_not_grow_with_samples() -> None:
    """10^9 samples take what 10^5 take: the order knows shards alone."""
    peaks = []
    for each in (10, 100_000):
        tracemalloc.start()
        order = WindowOrder(np.full(10_000, each, dtype=np.int64), 0, 3)
        last = len(order) * 99 // 100
        assert len(set(order[last : last + 64].tolist())) == 64
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(order) == 10**9
    assert max(peaks) < 4 << 20
    assert abs(peaks[1] - peaks[0]) < 1 << 20


# Ranks, loader processes, resumed epochs.


def test_any_ranks_and_processes_resume_the_same_sequence(root: Path) -> None:
    whole = trained(root, each=12)
    labels = [label for _, found in whole for label in found]
    assert len(set(labels)) == len(labels) == sum(COUNTS)
    assert labels != sorted(labels)
    picked = random.Random(0)
    for world in (1, 2, 3, 4):
        start = picked.randrange(len(whole))
        resumed = trained(root, start=12 * start, world=world)
        assert len(resumed) == len(whole) - start
        for (images, found), (again, same) in zip(whole[start:], resumed, strict=True):
            assert found == same
            assert torch.equal(images, again)


def test_loader_processes_change_nothing(root: Path) -> None:
    for (images, found), (again, same) in zip(
        trained(root, 2, 12), trained(root, 2, 12, workers=2), strict=True
    ):
        assert found == same
        assert torch.equal(images, again)


def test_a_change_of_ranks_in_an_epoch_loses_no_sample(root: Path) -> None:
    """4 samples a step; killed after each step and resumed on 1, 2, 4 ranks in turn."""
    whole = [label for _, found in trained(root, each=4) for label in found]
    seen: list[int] = []
    for step in range(6):
        _, found = trained(root, start=4 * step, world=(1, 2, 4)[step % 3], each=4)[0]
        seen += found
    assert seen == whole
    assert sorted(whole) == list(range(24))


@pytest.mark.parametrize("world", [1, 3, 7])
def test_evaluation_counts_each_sample_once(root: Path, world: int) -> None:
    """With more ranks than shards, too; each rank reads its own samples alone."""
    seen: list[int] = []
    read = 0
    for rank in range(world):
        with counted_reads() as reads:
            for _, targets, valid in create_eval_loader(config(root), SPEC, rank=rank, world_size=world):
                seen += targets[valid].tolist()
        read += reads[0]
    assert sorted(seen) == list(range(24))
    assert read == 24


class counted_reads:  # noqa: N801
    """Counts the samples that are read."""

    def __enter__(self) -> list[int]:
        self.patch, count = pytest.MonkeyPatch(), [0]
        read = ShardImages._contents

        def counting(*arguments: Any) -> Any:
            count[0] += 1
            return read(*arguments)

        self.patch.setattr(ShardImages, "_contents", counting)
        return count

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def test_what_needs_labels_by_index_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_samples=4"):
        create_train_loader(config(root, train_samples=4), SPEC, seed=0)
    with pytest.raises(ConfigError, match=r"data\.classes"):
        create_train_loader(config(root, classes=["a"]), SPEC, seed=0)


# Indexes.


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stamps of the shards that were read for their index."""
    stamps: list[str] = []
    read = shard_index.read_members
    monkeypatch.setattr(
        shard_index, "read_members", lambda stream, stamp: stamps.append(stamp) or read(stream, stamp)
    )
    return stamps


def test_an_index_is_made_once_and_a_seek_reads_one(
    root: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ShardImages(config(root), "s-{0..5}.tar", "RGB")
    assert len(made) == len(COUNTS)
    images = pickle.loads(pickle.dumps(images))
    looked: list[str] = []
    find = shards.find_index
    monkeypatch.setattr(shards, "find_index", lambda place, stamp: looked.append(place) or find(place, stamp))
    again = ShardImages(config(root), "s-{0..5}.tar", "RGB")
    order = again.order(0, 5)
    _, label = again.read(int(order[23:][0]))
    assert label == order[23:][0]
    assert len(looked) == 1
    assert len(made) == len(COUNTS)
    assert "in/004" in images.path(4)
    assert images.header(4).kind == "JPEG"


def test_an_index_that_is_lost_or_damaged_is_made_again(root: Path, cache: Path) -> None:
    place = str(root / "s-2.tar")
    index = find_index(place)
    assert len(index) == 7
    files = [path for path in cache.rglob("*.npz") if path.is_file()]
    content = files[0].read_bytes()
    assert ShardIndex.of(content) is not None
    for damaged in (b"", content[: len(content) // 2], b"x" * 99):
        files[0].write_bytes(damaged)
        assert ShardIndex.of(damaged) is None
        assert find_index(place, index.stamp).files(3) == index.files(3)
        assert files[0].read_bytes() == content


def index_again(root: object, **keys: Any) -> int:
    """Return how many indexes were written."""
    return index_split(config(root, workers=3), "s-{0..5}.tar", **keys).written


def test_indexes_are_made_ahead_and_found_beside_their_shards(
    root: Path, cache: Path, made: list[str], tmp_path: Path
) -> None:
    assert [index_again(root) for _ in range(2)] == [6, 0]
    assert [index_again(root, aside=True) for _ in range(2)] == [6, 0]
    assert len(made) == 6
    shutil.rmtree(cache)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # with other times
    for folder in (root, copy):
        images = ShardImages(config(folder), "s-{0..5}.tar", "RGB")
        assert [images.read(number)[1] for number in range(24)] == list(range(24))
    assert len(made) == 6
    (root / "s-3.tar.npz").write_bytes(b"damaged")
    (root / "s-4.tar").touch()
    assert index_again(root, aside=True) == 2
    assert len(made) == 7 + 1


@pytest.mark.parametrize("served", [False, True])
def test_an_index_of_another_shard_is_refused_when_a_sample_is_read(
    root: Path, url: str, cache: Path, served: bool
) -> None:
    """The shard has as many bytes as the one whose index is beside it, and other files."""
    place = url if served else root
    for label in (b"1", b"12"):
        write_tar(root / "s-0.tar", {f"a{n}.{kind}": label for n in range(2) for kind in ("png", "cls")})
        if label == b"1":
            index_again(root, aside=True)
            shutil.rmtree(cache)
    images = ShardImages(config(place), "s-{0..5}.tar", "RGB")
    with pytest.raises(SourceLostError, match=r"s-0\.tar has changed.*graftvit data index"):
        images.read(0)
    assert index_again(place) == 1 + 5 * served
    assert ShardImages(config(place), "s-{0..5}.tar", "RGB")._contents(0, (512, 2)) == [b"12"]


def test_of_many_processes_one_makes_an_index(root: Path, made: list[str]) -> None:
    """Each thread has a lock of its own, as a process has."""
    place = str(root / "s-2.tar")
    with ThreadPoolExecutor(6) as several:
        found = list(several.map(find_index, [place] * 6))
    assert len(made) == 1
    assert all(index.to_bytes() == found[0].to_bytes() for index in found)


def test_a_cache_that_cannot_be_written_is_done_without(root: Path, tmp_path: Path, made: list[str]) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert [len(find_index(str(root / "s-2.tar"))) for _ in range(2)] == [7, 7]
    assert len(made) == 2


def test_a_changed_shard_is_counted_again_and_refused_in_a_run(root: Path) -> None:
    images = ShardImages(config(root), "s-{0..5}.tar", "RGB")
    images.read(20)
    write_tar(root / "s-5.tar", {f"{n}.{kind}": encoded(n) if kind == "png" else b"1"
                                 for n in range(9) for kind in ("png", "cls")})  # fmt: skip
    for number in (20, 21):
        with pytest.raises(SourceLostError, match=r"s-5\.tar has changed"):
            images.read(number)
    assert len(ShardImages(config(root), "s-{0..5}.tar", "RGB")) == 29
    loader = create_train_loader(config(root, max_bad_images=9), SPEC, seed=0)
    (root / "s-5.tar").unlink()
    with pytest.raises(DataError, match=r"s-5\.tar does not exist"):
        list(loader.epoch(0))


@pytest.mark.parametrize("cut", [100, 700, 1400])
def test_a_shard_that_is_cut_or_damaged_is_named(root: Path, cut: int) -> None:
    path = root / "s-1.tar"
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read"):
        ShardImages(config(root), "s-{0..5}.tar", "RGB")
    third = content.index(b"in/005.seg.bin")
    path.write_bytes(content[:third] + b"\x07" * 512 + content[third + 512 :])
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read: .*in/005\.jpg"):
        ShardImages(config(root), "s-{0..5}.tar", "RGB")


def test_a_shard_that_ends_between_two_files_or_was_joined_to_another_is_refused(root: Path) -> None:
    path = root / "s-1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"in/005.cls")])
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read: it is cut off after 'in/005\.seg\.bin'"):
        find_index(str(path))
    path.write_bytes(content + content)
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read: it has more after its end"):
        find_index(str(path))


def test_samples_of_one_name_that_follow_each_other_stay_apart(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one.tar", {"a.jpg": b"0", "a.cls": b"0"}).read_bytes()
    shard = tmp_path / "two.tar"
    shard.write_bytes(one[:2048] + one)  # two headers and two contents of a block each
    index = find_index(str(shard))
    assert [index.key(sample) for sample in range(len(index))] == ["a", "a"]
    assert [list(index.files(sample)) for sample in range(2)] == [["jpg", "cls"]] * 2


def test_a_bad_sample_is_named_and_replaced(root: Path) -> None:
    path = root / "s-3.tar"
    content = path.read_bytes()
    begin = content.index(b"\xff\xd8")
    path.write_bytes(content[:begin] + b"no image" + content[begin + 8 :])
    loader = create_eval_loader(config(root, max_bad_images=1), SPEC)
    labels = [int(each) for _, targets, valid in loader for each in targets[valid]]
    assert sorted(labels) == [number for number in range(24) if number != 13]
    assert loader.bad_images == [f"{path}: in/013"]


def test_patterns_are_expanded() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand("plain.tar") == ["plain.tar"]


# Servers.


class Ranges(BaseHTTPRequestHandler):
    """Sends ranges of the files of a folder."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]]
    busy: ClassVar[list[int]]
    whole: ClassVar[bool] = False
    versions: ClassVar[bool] = True
    together: ClassVar[threading.Barrier | None] = None

    def do_GET(self) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        wanted = None if self.whole else self.headers.get("Range")
        self.asked.append(f"{self.command} {wanted}")
        if self.together and wanted != "bytes=0-0":
            self.together.wait(20)  # its error ends the request, so that the reader asks again and again
        status = self.busy.pop() if self.busy else 200 if path.is_file() else 404
        content = path.read_bytes() if status == 200 else b""
        total = len(content)
        self.send_response(206 if status == 200 and wanted else status)
        if wanted and status == 200:
            first, last = wanted.removeprefix("bytes=").split("-")
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            content = content[int(first) : int(last) + 1]
        if path.is_file() and self.versions:
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(root: Path) -> Iterator[str]:
    Ranges.folder, Ranges.asked, Ranges.busy = root, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_gives_the_same_batches(root: Path, url: str) -> None:
    local = trained(root)
    for (images, found), (again, same) in zip(local, trained(url, world=2), strict=True):
        assert found == same
        assert torch.equal(images, again)
    before = len(Ranges.asked)
    assert len(trained(url, start=12)) == 1
    later = Ranges.asked[before:]
    assert (later.count("GET bytes=0-0"), len(later)) == (6, 6 + 12)
    assert "GET None" not in later


@pytest.mark.parametrize("training", [True, False])
def test_the_samples_of_a_batch_are_asked_for_together(
    url: str, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    settings = config(url, batch_size=12, eval_batch_size=12)
    loader = create_train_loader(settings, SPEC, seed=7) if training else create_eval_loader(settings, SPEC)
    before = len(Ranges.asked)
    monkeypatch.setattr(Ranges, "together", threading.Barrier(12))
    batches = list(loader.epoch_from(1, 0)) if training else list(loader)
    assert [len(batch[0]) for batch in batches] == [12, 12]
    assert sum(asked != "GET bytes=0-0" for asked in Ranges.asked[before:]) == 24


def test_a_process_ends_while_a_server_is_silent(url: str) -> None:
    shards._readers.cache_clear()
    before = set(threading.enumerate())
    images = ShardImages(config(url), "s-{0..5}.tar", "RGB")
    images.read_ahead([0])
    assert images.read(0)[1] == 0
    started = set(threading.enumerate()) - before
    assert started
    assert all(thread.daemon for thread in started)  # Python waits for the others


def test_a_server_without_ranges_is_refused_before_a_shard_is_read(
    root: Path, url: str, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranges, "whole", True)
    with pytest.raises(SourceLostError, match="sends no ranges: copy the shards to a disk"):
        index_again(url)
    assert not made


def test_a_server_gives_indexes_that_lie_beside_shards(
    root: Path, url: str, cache: Path, made: list[str]
) -> None:
    index_again(root, aside=True)
    shutil.rmtree(cache)
    for asked in (1, 0):
        before = len(Ranges.asked)
        assert len(ShardImages(config(url), "s-{0..5}.tar", "RGB")) == 24
        assert Ranges.asked[before:].count("GET None") == 6 * asked
    assert len(made) == 6
    with pytest.raises(DataError, match="a web server takes no files"):
        index_again(url, aside=True)


def test_indexes_of_a_server_without_versions_are_made_again(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranges, "versions", False)
    assert index_again(url) == index_again(url) == 6


def test_a_busy_server_is_asked_again_and_a_changed_shard_refused(root: Path, url: str) -> None:
    images = ShardImages(config(url), "s-{0..5}.tar", "RGB")
    Ranges.busy += [503, 500]
    assert images.read(3)[1] == 3
    (root / "s-0.tar").touch()
    with pytest.raises(SourceLostError, match=r"s-0\.tar has changed"):
        images.read(4)
    assert index_again(url) == 1
    assert ShardImages(config(url), "s-{0..5}.tar", "RGB").read(4)[1] == 4
    Ranges.busy += [403]
    with pytest.raises(SourceLostError, match="403"):
        images.read(20)
    with pytest.raises(SourceLostError, match="404"):
        ShardImages(config(url), "none-{0..1}.tar", "RGB")


def test_a_host_that_does_not_exist_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it was asked again"))
    unknown = URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=unknown))
    with pytest.raises(SourceLostError, match=r"no-such-host.* not known"):
        ShardImages(config("http://no-such-host.invalid"), "s-{0..5}.tar", "RGB")


def test_other_places_are_read_by_fsspec_and_say_what_they_need(
    root: Path, cache: Path, made: list[str]
) -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.filesystem("memory").open("memory://box/s-0.tar", "wb") as file:
        file.write((root / "s-0.tar").read_bytes())
    images = ShardImages(config("memory://box"), "s-0.tar", "RGB")
    assert [images.read(number)[1] for number in range(5)] == [0, 1, 2, 3, 4]
    assert index_split(config("memory://box"), "s-0.tar", aside=True).written == 1
    shutil.rmtree(cache)
    assert len(ShardImages(config("memory://box"), "s-0.tar", "RGB")) == 5
    assert len(made) == 1
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(DataError, match="pip install gcsfs"):
            ShardImages(config("gs://box"), "s-0.tar", "RGB")
