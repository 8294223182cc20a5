"""Read shards from a local server of ranges: `python -m benchmarks.shards`.

kills: ranks that read an epoch are killed (-9) at random points and resumed on 1, 2, 3 and 4 ranks. What they read is
compared with an epoch that nobody stopped, from the disk.
seek: what is read to begin at 99 % of an epoch.
memory: what a rank holds of 10^5 and of 10^9 samples, which are not there.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import signal
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import psutil
import torch.distributed as dist
from graftvit.checkpoints.atomic import write_text
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.transfer.analysis.report.tables import Table
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import shards
from graftvit.transfer.data.loaders import create_train_loader
from graftvit.transfer.data.shards import ShardImages, count_samples, index_split

from .tiles import CLASSES, draw_tiles

SPEC = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
SEED, EPOCH = 3, 1
RANKS = (1, 2, 3, 4)
FORK = multiprocessing.get_context("fork")
"""Ranks begin as copies of this process: they need not import torch again."""
VIRTUAL = {10**5: 10, 10**9: 100_000}
"""Shards that hold so many samples: 10,000 each."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.shards", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["kills", "seek", "memory"])
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard")
    parser.add_argument(
        "--step", type=int, default=48, help="samples of all ranks in a step, divisible by 12"
    )
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        if {"kills", "seek"} & set(arguments.parts):
            make_shards(folder / "shards", arguments.shards, arguments.samples)
            with served(folder / "shards") as server:
                if "kills" in arguments.parts:
                    rows += measure_kills(folder, server, arguments)
                if "seek" in arguments.parts:
                    rows += measure_seek(folder, server, arguments.shards)
        if "memory" in arguments.parts:
            rows += measure_memory()
    print(Table(["measured", "found"], rows).to_markdown())


def make_shards(folder: Path, shards: int, samples: int) -> None:
    """Write shards of tiles of photographs; the label of a sample is its number."""
    folder.mkdir()
    kinds = [draw_tiles(label, np.random.default_rng(label)) for label in range(len(CLASSES))]
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard:04d}.tar", "w") as archive:
            for number in range(shard * samples, (shard + 1) * samples):
                picture = io.BytesIO()
                next(kinds[number % len(kinds)]).save(picture, "JPEG")
                for ending, content in (("jpg", picture.getvalue()), ("cls", str(number).encode())):
                    described = tarfile.TarInfo(f"{number:08d}.{ending}")
                    described.size = len(content)
                    archive.addfile(described, io.BytesIO(content))


def config(place: object, shards: int, **more: Any) -> DataConfig:
    split = f"s-{{0000..{shards - 1:04d}}}.tar"
    common = {"dataset": "wds/tiles", "data_path": str(place), "train_split": split, "val_split": None}
    return DataConfig(**common | {"num_classes": 10**6, "workers": 0} | more)


# The server, in a process of its own.


class Ranges(BaseHTTPRequestHandler):
    """Sends files of a folder and ranges of them, and counts the bytes."""

    folder: ClassVar[Path]
    sent: ClassVar[Any]

    def do_GET(self) -> None:
        path = self.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            self.send_error(404)
            return
        total, wanted = path.stat().st_size, self.headers.get("Range")
        first, last = 0, total - 1
        if wanted:
            first, last = (int(each) for each in wanted.removeprefix("bytes=").split("-"))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(last - first + 1)
        self.wfile.write(content)
        with self.sent.get_lock():
            self.sent.value += len(content)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Say nothing: its client was killed."""


@dataclass(frozen=True)
class Served:
    """A server's address, and the bytes of files that it has sent."""

    url: str
    sent: Any


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    Ranges.folder, Ranges.sent = folder, FORK.Value("q", 0)
    with Server(("127.0.0.1", 0), Ranges) as server:
        process = FORK.Process(target=server.serve_forever, daemon=True)
        process.start()
        yield Served(f"http://127.0.0.1:{server.server_port}", Ranges.sent)
        process.kill()
        process.join()


# Kills.


@dataclass(frozen=True)
class Job:
    """An epoch that ranks read in steps. `folder` gets what each read, and, after each step, the position to resume."""

    data: DataConfig
    folder: Path
    step: int

    @property
    def position(self) -> int:
        path = self.folder / "position"
        return int(path.read_text()) if path.exists() else 0

    def read(self, attempt: int, rank: int, world: int) -> None:
        """Read on from the last position, as a rank of a run does."""
        dist.init_process_group(
            "gloo", init_method=f"file://{self.folder}/meeting-{attempt}", rank=rank, world_size=world
        )
        each, position = self.step // world, self.position
        data = self.data.model_copy(update={"batch_size": each})
        loader = create_train_loader(data, SPEC, seed=SEED, rank=rank, world_size=world)
        with (self.folder / f"read-{attempt}-{rank}").open("w") as log:
            for images, labels in loader.epoch_from(EPOCH, position):
                first = position + rank * each
                for place, (image, label) in enumerate(zip(images, labels, strict=True), first):
                    log.write(f"{place} {int(label)} {zlib.crc32(image.numpy().tobytes()):08x}\n")
                log.flush()
                dist.barrier()
                position += self.step
                if rank == 0:
                    write_text(self.folder / "position", str(position))
        dist.barrier()

    def start(self, attempt: int, world: int) -> list[BaseProcess]:
        ranks = [FORK.Process(target=self.read, args=(attempt, rank, world)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        return list(ranks)

    def sequence(self) -> tuple[list[str], int]:
        """Return the samples by position, and how many were read again because no position had been kept.

        Raises RuntimeError: a sample was read at two positions, two at one, or one is missing.
        """
        found: dict[int, str] = {}
        again = 0
        for log in sorted(self.folder.glob("read-*")):
            for line in log.read_text().splitlines():
                place, sample = line.split(" ", 1)
                again += int(place) in found
                if found.setdefault(int(place), sample) != sample:
                    raise RuntimeError(f"position {place} gave {found[int(place)]}, and later {sample}")
        samples = [found[place] for place in sorted(found)]
        if sorted(found) != list(range(self.position)) or len(set(samples)) < len(samples):
            raise RuntimeError(f"of {self.position} positions {len(set(samples))} samples were read")
        return samples, again


def measure_kills(folder: Path, server: Served, arguments: argparse.Namespace) -> list[list[str]]:
    whole = Job(config(folder / "shards", arguments.shards), folder / "whole", arguments.step)
    killed = Job(config(server.url, arguments.shards, workers=1), folder / "killed", arguments.step)
    for job in (whole, killed):
        job.folder.mkdir()
    steps = arguments.shards * arguments.samples // arguments.step
    random = Random(0)
    points = [0, *sorted(random.sample(range(1, steps * 9 // 10), arguments.kills - 1))]
    kills = 0
    for attempt, point in enumerate(points):
        ranks = killed.start(attempt, RANKS[attempt % len(RANKS)])
        while killed.position < point * arguments.step and all(rank.exitcode is None for rank in ranks):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.02 if point else 0.3))  # at first while indexes are made
        kills += kill(ranks)
    for rank in [*killed.start(len(points), RANKS[len(points) % len(RANKS)]), *whole.start(0, 1)]:
        rank.join()
    samples, again = killed.sequence()
    if samples != whole.sequence()[0]:
        raise RuntimeError("the epoch that was killed gave other samples than the one that was not")
    return [
        ["samples of the epoch", f"{len(samples):,} of {arguments.shards * arguments.samples:,}"],
        ["kills, each resumed on another number of ranks (1 to 4)", f"{kills}"],
        ["samples that differ from those of the epoch not stopped, are missing or come twice", "0"],
        ["samples read again, because they were of the step that was killed", f"{again:,}"],
    ]


def kill(ranks: Sequence[BaseProcess]) -> bool:
    """Kill all ranks. Raises RuntimeError: one had failed."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    codes = {rank.exitcode for rank in ranks}
    if codes - {0, -signal.SIGKILL}:
        raise RuntimeError(f"a rank ended by itself, with {codes}")
    return -signal.SIGKILL in codes


# A seek, and memory: each in a process of its own.


def apart(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `measure` returns in another process. Raises EOFError: it failed there."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: there.send(measure(*arguments)))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def measure_seek(folder: Path, server: Served, count: int) -> list[list[str]]:
    local, remote = config(folder / "shards", count), config(server.url, count)
    index_split(local, local.train_split, aside=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "another")
    rows = []
    for name, samples in (("1 sample, first start on a machine", 1), ("1 sample", 1), ("a batch of 32", 32)):
        before = server.sent.value
        seconds, indexes = apart(seek, remote, samples)
        sent = (server.sent.value - before) / 1024
        rows.append(
            [
                f"seek to 99 %, {name}",
                f"{seconds:.2f} s; indexes read: {indexes}; from the server: {sent:,.0f} KiB",
            ]
        )
    return rows


def seek(data: DataConfig, samples: int) -> tuple[float, int]:
    """Return the seconds until samples at 99 % of an epoch are read, and how many indexes were."""
    find, looked = shards.find_index, []
    shards.find_index = lambda *place: looked.append(place) or find(*place)  # type: ignore[assignment]
    begin = time.monotonic()
    images = ShardImages(data, data.train_split, "RGB")
    order = images.order(SEED, EPOCH)
    start = len(order) * 99 // 100
    for number in order[start : start + samples]:
        images.read(int(number))
    return time.monotonic() - begin, len(looked)


def measure_memory() -> list[list[str]]:
    grown = {}
    for samples, count in VIRTUAL.items():
        data = config("http://nowhere.invalid", count)
        apart(count_virtual, data, samples // count)
        grown[samples] = apart(hold, data)
    held, peak = (grown[10**9][place] - grown[10**5][place] for place in (0, 1))
    return [
        [
            "memory of a rank, 10^9 samples against 10^5 (100,000 shards, 10)",
            f"{held:+.0f} MiB, peak {peak:+.0f} MiB",
        ]
    ]


class VirtualIndex:
    """Stands for the index of a shard that is not there."""

    stamp = f"1000000000-{'0' * 32}"

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples


def count_virtual(data: DataConfig, each: int) -> None:
    """Put the number of samples of each shard into the cache."""
    shards.find_index = lambda place: VirtualIndex(each)  # type: ignore[assignment, return-value]
    count_samples(shards.find_split(data, data.train_split).places)


def hold(data: DataConfig) -> tuple[float, float]:
    """Return by how many MiB the process grew, and its peak, when it opens shards and computes a batch's samples."""
    before = psutil.Process().memory_info().rss
    images = ShardImages(data, data.train_split, "RGB")
    order = images.order(SEED, EPOCH)
    start = len(order) * 99 // 100
    order[start : start + 1024]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (psutil.Process().memory_info().rss - before) / 2**20, (peak - before) / 2**20


if __name__ == "__main__":
    main()
