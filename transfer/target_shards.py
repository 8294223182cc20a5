"""The folder of a cache of teacher targets: one file for each range of samples and view, named by what they depend on.

    DIR/<digest of all that the targets depend on>/about.json
    DIR/<digest>/view-000/shard-00000.safetensors

A file is written whole or not at all, and holds a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.atomic import WriteFailedError, write_text
from ..checkpoints.files import nearest_folder, read_regular
from ..checkpoints.preprocessing import Preprocessing
from ..checkpoints.provenance import Pretrained, collect_identity
from ..checkpoints.state import TrainingState as Content
from ..checkpoints.state import check_state, write_state
from ..models.errors import CheckpointError, ConfigError, DataError, JsonDict
from ..models.parts import num_classes
from .config import RunConfig
from .data.loaders import TrainLoader
from .data.sampler import BatchRequest
from .methods.dual import DualViT
from .methods.loss_terms import DEFAULT_TEACHER, TeacherSide
from .methods.method import TransferMethod
from .setting import rule_of
from .target_forms import TargetForm

# What a run with `transfer.cache` must be, before anything is read.

MARGIN = 0.9
"""The part of the free disk that targets may take by default."""


def check_cache(config: RunConfig, methods: Sequence[TransferMethod]) -> None:
    """Raise ConfigError for settings with which a teacher's targets cannot be kept."""
    data, transfer = config.data, config.transfer
    if transfer.cache is None:
        return
    if not transfer.cache.strip() or (Path(transfer.cache).exists() and not Path(transfer.cache).is_dir()):
        raise ConfigError(
            f"transfer.cache={transfer.cache!r} is not a folder: name one, which is made if needed"
        )
    for method in methods:
        if method.uses_layers:
            raise ConfigError(
                f"transfer.cache={transfer.cache} does not go with transfer.method={method.name}, which takes maps or "
                "tokens of its teacher's layers: use logits or feature, or leave transfer.cache out"
            )
    if transfer.share_drop_path:
        raise ConfigError(
            "transfer.cache does not go with transfer.share_drop_path=true, with which a teacher computes something "
            "else in each step: set one of them to false or none"
        )
    if data.views is None:
        raise ConfigError(
            "transfer.cache keeps targets of a fixed number of views of each image: set data.views to a number, or to "
            "0 for no augmentation"
        )
    for name in ("mixup", "cutmix"):
        if getattr(data, name) > 0:
            raise ConfigError(
                f"transfer.cache does not go with data.{name}={getattr(data, name):g}, which mixes other "
                "images in each epoch: set it to 0"
            )


def check_metric(kind: str) -> None:
    """Raise ConfigError for a metric that needs the teacher on the test images."""
    if kind in ("distance", "objective"):
        raise ConfigError(
            "transfer.cache keeps targets of the training images alone, and this run's metric needs the teachers on "
            "the test images: set engine.metric to top1, knn or probe, or data.val_split to none"
        )


def check_size(folder: str, limit: float | None, whole: int, missing: int, *, here: bool) -> None:
    """Raise ConfigError where the targets of a run, `whole` bytes of which some are `missing`, are too large.

    `here`: the run would be on this machine, whose disk is known.
    """
    if limit is not None:
        if whole > limit * 2**30:
            raise ConfigError(
                f"transfer.cache={folder} would hold {gibibytes(whole)} for this run, more than "
                f"transfer.cache_limit={limit:g} GiB: raise it, or lower data.views"
            )
        return
    free = shutil.disk_usage(nearest_folder(Path(folder))).free
    if here and missing > MARGIN * free:
        raise ConfigError(
            f"transfer.cache={folder} lacks {gibibytes(missing)}, more than 90% of the {gibibytes(free)} that are free "
            "there: make room, name another folder, lower data.views, or set transfer.cache_limit"
        )


def gibibytes(size: float) -> str:
    """Return a size in GiB, in MiB where it is small."""
    if size < 2**28:
        return f"{math.ceil(size / 2**20 * 10) / 10:.1f} MiB"
    return f"{size / 2**30:.2f} GiB"


# A lock of one file among the processes that may write it; the system frees it when its process dies.

POLL = 0.05
"""Seconds between two looks at a file that another process writes."""


class ShardLock:
    """The right to write `path`, held until `free`."""

    def __init__(self, path: Path, file: BinaryIO | None) -> None:
        self._path = path
        self._file = file

    @classmethod
    def take(cls, path: Path) -> ShardLock | None:
        """Return the lock; None where another process has it. A file system without locks lets everybody in.

        Raises WriteFailedError: nothing can be written beside `path`.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return cls(path, None)
        own = path.with_name(f".{path.name}.lock")
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            file = own.open("ab")
        except OSError as error:
            raise WriteFailedError(
                f"transfer.cache: {path} is missing or damaged, and cannot be written ({error.strerror}): let someone "
                "who may write there compute the targets first, or name another folder"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            return cls(own, file)
        if not _is_same(own, file):  # its holder removed it meanwhile
            file.close()
            return None
        return cls(own, file)

    def free(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()


def write_once(path: Path, text: str) -> None:
    """Write a file that several processes may write at once, all the same text. Raise WriteFailedError."""
    while not path.exists():
        lock = ShardLock.take(path)
        if lock is None:
            time.sleep(POLL)
            continue
        try:
            if not path.exists():
                write_text(path, text)
        finally:
            lock.free()


def _is_same(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


logger = logging.getLogger(__name__)

LARGEST_SHARD, SMALLEST_SHARD, SHARDS = 4096, 256, 64
"""Samples of a shard, and how many shards a small set is divided into."""
ABOUT = "about.json"


class Shard(NamedTuple):
    """A range of samples in one view."""

    view: int
    first: int
    size: int


def digest_of(described: JsonDict) -> str:
    """Return the name of what is described as plain data."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TargetShards:
    """The targets of one set of images by one set of teachers."""

    root: Path
    """The folder `transfer.cache`."""
    described: JsonDict
    """All that the targets depend on."""
    samples: int
    form: TargetForm

    @property
    def folder(self) -> Path:
        """The folder of these targets alone."""
        return self.root / digest_of(self.described)

    @property
    def shard_size(self) -> int:
        """Samples of each shard but the last."""
        return min(LARGEST_SHARD, max(SMALLEST_SHARD, -(-self.samples // SHARDS)))

    def shards(self, views: Iterable[int]) -> list[Shard]:
        """Return all shards of some views."""
        size = self.shard_size
        return [
            Shard(view, first, min(size, self.samples - first))
            for view in views
            for first in range(0, self.samples, size)
        ]

    def path(self, shard: Shard) -> Path:
        """Return the file of a shard."""
        number = shard.first // self.shard_size
        return self.folder / f"view-{shard.view:03d}" / f"shard-{number:05d}.safetensors"

    def open(self) -> None:
        """Make the folder and say in it what it is of.

        A damaged description is written again: each shard says itself what it is of.

        Raises ConfigError: the folder says that it is of something else. WriteFailedError: it cannot be written.
        """
        path = self.folder / ABOUT
        text = json.dumps({"samples": self.samples, "shard": self.shard_size, **self.described}, indent=1)
        write_once(path, text)
        try:
            found = read_regular(path, errors="replace")
        except CheckpointError as error:
            raise ConfigError(f"transfer.cache: {error}") from error
        if found == text:
            return
        if _is_json(found):
            raise ConfigError(
                f"transfer.cache: {path} describes other targets: remove the folder {self.folder}, and they are "
                "computed again"
            )
        logger.warning("transfer.cache: %s is damaged; it is written again", path)
        write_text(path, text)

    def unsound(self, shards: Iterable[Shard]) -> list[Shard]:
        """Return the shards that are missing or damaged; name each damaged one in the log."""
        faults = {shard: self.fault(shard) for shard in shards}
        for shard, fault in faults.items():
            if fault is not None and self.path(shard).exists():
                logger.warning("transfer.cache: %s; its targets are computed again", fault)
        return [shard for shard, fault in faults.items() if fault is not None]

    def fault(self, shard: Shard) -> str | None:
        """Return why the file of a shard cannot be used; None if it is there and whole: its digest is computed."""
        path = self.path(shard)
        if not path.exists():
            return f"{path} is missing"
        try:
            known = check_state(path)
            return None if known == self._meta(shard) else f"{path} is not of these images"
        except CheckpointError as error:
            return str(error)

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Write the targets of a shard, whole or not at all. Raises WriteFailedError as `write_state`."""
        write_state(self.path(shard), Content(dict(tensors), self._meta(shard)))

    def _meta(self, shard: Shard) -> JsonDict:
        return {"targets": self.folder.name, **shard._asdict()}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# All that teacher targets depend on: another teacher, other images or another precision have another folder.

FORMAT = 1


def find_shards(
    config: RunConfig,
    dual: DualViT,
    teachers: Mapping[str, Pretrained],
    spec: Preprocessing,
    loader: TrainLoader,
) -> TargetShards:
    """Return the files of the targets of a run. Raises ConfigError: its images are a stream."""
    if loader.streamed:
        raise ConfigError(
            f"transfer.cache needs samples by index; data.dataset={config.data.dataset} is a stream: leave it out"
        )
    form = _form_of(config, dual)
    described: JsonDict = {
        "format": FORMAT,
        "form": asdict(form),
        "teachers": {
            side.name: _describe_teacher(config, dual, side, teachers[side.name], spec) for side in dual.sides
        },
        "precision": config.engine.precision,
        "tf32": config.engine.tf32,
        "images": _describe_images(config, spec, loader),
    }
    return TargetShards(Path(str(config.transfer.cache)), described, loader.num_samples, form)


def _form_of(config: RunConfig, dual: DualViT) -> TargetForm:
    how = config.transfer
    classes = 0 if how.cache_top is None else num_classes(dual.student)
    return TargetForm(how.cache_type, how.cache_top, how.cache_pool, classes)


def has_weights(shards: TargetShards) -> bool:
    """Return whether the teachers' weights were read, so that the name of the folder is known."""
    return all(each["digest"] is not None for each in shards.described["teachers"].values())


def digest_of_samples(name: Callable[[int], str], count: int, root: str | None) -> str:
    """Return a digest of the names of samples in their order, without the folder of the data set."""
    found = hashlib.sha256()
    prefix = "" if root is None else os.path.join(root, "")  # noqa: PTH118 - a text, not a place
    for index in range(count):
        found.update(name(index).removeprefix(prefix).encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _describe_teacher(
    config: RunConfig, dual: DualViT, side: TeacherSide, teacher: Pretrained, spec: Preprocessing
) -> JsonDict:
    how = config.teacher if side.name == DEFAULT_TEACHER else config.teachers[side.name]
    height, width = spec.input_size[1:]
    return {
        **collect_identity(teacher),
        "position_embedding": how.position_embedding,
        "dtype": how.dtype,
        "size": list(side.input.teacher_size((height, width))),
        "targets": sorted(dual.wanted(side).whole),
    }


def _describe_images(config: RunConfig, spec: Preprocessing, loader: TrainLoader) -> JsonDict:
    data = config.data
    described: JsonDict = {
        "dataset": data.dataset,
        "split": data.train_split,
        "samples": digest_of_samples(loader.batches.name, loader.num_samples, data.data_path),
        **spec.described(),
    }
    if data.views == 0:
        return described
    fields = type(data).model_fields.items()
    drawn = data.model_dump(mode="json", include={name for name, field in fields if rule_of(field).drawn})
    return {**described, "augmentation": {**drawn, "seed": config.seed}}


# What loader processes add to images: a checksum of their pixels, and the targets that were computed of them.

PIXELS = "pixels"
"""The checksums, beside the targets."""


def add_checksums(
    view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
) -> dict[str, Tensor]:
    """Return a checksum of each of the images (B, C, H, W)."""
    sums = [zlib.crc32(image.contiguous().numpy().data) for image in images]
    return {PIXELS: torch.tensor(sums, dtype=torch.int64)}


class TargetRows:
    """Adds to each image its targets. Files are mapped into memory when they are first needed."""

    def __init__(self, shards: TargetShards) -> None:
        self._shards = shards
        self._opened: dict[Shard, dict[str, Tensor]] = {}

    def __call__(
        self, view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
    ) -> dict[str, Tensor]:
        """Return the targets (B, ...) by name.

        Raises DataError: an image has other pixels than when its targets were computed, or a file cannot be read.
        """
        rows = [self._row(view, index) for index in indices]
        found = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        same = found.pop(PIXELS) == add_checksums(view, indices, images, name)[PIXELS]
        if not bool(same.all()):
            first = indices[int((~same).int().argmax())]
            raise DataError(
                f"{name(first)} is not the image that its targets in transfer.cache were computed of: it was changed, "
                "or another version of Pillow, torchvision or timm makes other pixels of it; remove the folder "
                f"{self._shards.folder}, or name another transfer.cache"
            )
        return found

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_opened": {}}

    def _row(self, view: int, index: int) -> dict[str, Tensor]:
        size = self._shards.shard_size
        first = index // size * size
        shard = Shard(view, first, min(size, self._shards.samples - first))
        if shard not in self._opened:
            self._opened[shard] = self._open(shard)
        return {key: tensor[index - first] for key, tensor in self._opened[shard].items()}

    def _open(self, shard: Shard) -> dict[str, Tensor]:
        path = self._shards.path(shard)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"transfer.cache: {path} cannot be read: {error}") from error


# Compute the targets that a cache lacks, side by side with other processes that compute the same ones.

FILL_POLL = 1.0
"""Seconds between two looks at the shards that other processes compute."""
Teach = Callable[[Tensor], dict[str, Tensor]]


def fill(
    cache: TargetShards,
    todo: Sequence[Shard],
    loader: TrainLoader,
    teach: Teach,
    *,
    stopped: Callable[[], bool],
    moved: Callable[[int], object],
    kept: Callable[[], object],
) -> None:
    """Write the shards of `todo`, each by one of the processes that call this; return when all are there.

    Batches are as large as those of the run: the last one of a shard is padded, because sums over another number of
    images may be rounded otherwise.

    Args:
        cache: Where they are written.
        todo: The shards that are missing or damaged.
        loader: The training images.
        teach: Gives the targets of images.
        stopped: Whether to leave early.
        moved: Called after each batch with the number of its images, and with 0 after each look while others compute.
        kept: Called after each shard that this process has written.
    """
    left = list(todo)
    while left and not stopped():
        claims = _Claims(cache, left, loader.batch_size)
        requests = claims.requests()
        first = next(requests, None)
        if first is not None:
            try:
                _compute(cache, claims, chain([first], requests), loader, teach, stopped, moved, kept)
            finally:
                claims.free()
        left = claims.busy
        if left and first is None:
            moved(0)
            time.sleep(FILL_POLL)


def _compute(
    cache: TargetShards,
    claims: _Claims,
    requests: Iterator[BatchRequest],
    loader: TrainLoader,
    teach: Teach,
    stopped: Callable[[], bool],
    moved: Callable[[int], object],
    kept: Callable[[], object],
) -> None:
    rows: list[dict[str, Tensor]] = []
    for batch in loader.fetch_apart(requests, add_checksums):
        shard, valid = claims.asked.popleft()
        if batch.images is not None:
            found = {**teach(batch.images), **(batch.beside or {})}
            rows.append({name: tensor[:valid].cpu() for name, tensor in found.items()})
        if sum(len(row[PIXELS]) for row in rows) == shard.size:
            cache.write(shard, {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
            claims.done(shard)
            kept()
            rows = []
        moved(valid)
        if stopped():
            return


@dataclass
class _Claims:
    """The shards that this process computes, each claimed when the loader asks for its first batch."""

    cache: TargetShards
    todo: Sequence[Shard]
    batch_size: int
    busy: list[Shard] = field(default_factory=list)
    """Shards that another process computes."""
    asked: deque[tuple[Shard, int]] = field(default_factory=deque)
    """Shard and number of images of each batch that was requested and has not come."""
    held: dict[Shard, ShardLock] = field(default_factory=dict)

    def requests(self) -> Iterator[BatchRequest]:
        for shard in self.todo:
            lock = ShardLock.take(self.cache.path(shard))
            if lock is None:
                self.busy.append(shard)
                continue
            self.held[shard] = lock
            if self.cache.fault(shard) is None:
                self.done(shard)
                continue
            end = shard.first + shard.size
            for first in range(shard.first, end, self.batch_size):
                indices = tuple(range(first, min(first + self.batch_size, end)))
                padding = indices[-1:] * (self.batch_size - len(indices))
                self.asked.append((shard, len(indices)))
                yield BatchRequest(shard.view, first, indices + padding, len(indices))

    def done(self, shard: Shard) -> None:
        self.held.pop(shard).free()

    def free(self) -> None:
        for lock in self.held.values():
            lock.free()
        self.held.clear()
