"""A cache of teacher targets: an object for each range of samples and view, named by what it depends on.

    PLACE/<digest of the teachers, the preprocessing and the augmentation>/about.json
    PLACE/<digest>/view-000/shard-<digest of the samples>.rows

PLACE is a folder, or a place that fsspec writes. An object is written whole or not at all. It begins with the length of
its description (4 bytes) and the description in JSON, and then has a row of equal size for each sample: a checksum of
the image's pixels, one of the description and the row, and the targets. So each row is read and checked by itself.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.files import digest, is_url, nearest_folder
from ..checkpoints.preprocessing import Preprocessing
from ..checkpoints.provenance import Pretrained, collect_identity
from ..models.errors import ConfigError, DataError, JsonDict, gibibytes
from ..models.parts import num_classes
from .config import RunConfig
from .data.kept_views import describe_drawn
from .data.loaders import FullBatch, TrainLoader
from .data.loading import Samples, SourceLostError
from .data.shard_places import load, reached, store_of, write
from .loss_config import CacheType
from .methods.dual import DualViT
from .methods.feature import average_to
from .methods.loss_terms import DEFAULT_TEACHER, TeacherSide
from .methods.method import TransferMethod

# The forms in which a cache keeps what teachers compute: fewer numbers of it, in fewer bytes, and back.

INDEX, SCALE = ".index", ".scale"
"""Ends of the names of what is kept beside a target."""
LARGEST_INT8 = 127
KEPT = ("float32", "bfloat16", "float16", "int8", "int16", "int32")
TYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in KEPT}
"""The types of all that `pack` gives: no other one is read from a file of a cache."""


@dataclass(frozen=True)
class TargetForm:
    """What is kept of whole teachers' `classes` (B, C), `pooled` features (B, C) and `patches` (B, rows, columns, C).

    Of logits z with `top` = k, the k largest and their classes are kept, and r = log Σ exp(z_i) over the others, which
    `unpack` takes for equal: z_i = r - log(C - k). Patches are averaged over squares of `pool` a side. The numbers are
    then kept as they are (`exact`), in `bf16`, or in `int8`: x = s q with a scale s = max |x| / 127 for each vector,
    so that no number is wrong by more than s / 2.
    """

    type: CacheType = "exact"
    top: int | None = None
    pool: int = 1
    classes: int = 0
    """The number of classes C, for `top`."""

    def __post_init__(self) -> None:
        """Raise ConfigError: all logits are among the largest."""
        if self.top is not None and self.top >= self.classes:
            raise ConfigError(
                f"transfer.cache_top={self.top} is no part of the teacher's {self.classes} classes: leave it out"
            )

    def pack(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is kept of the targets of some images, each with the images first.

        Raises ConfigError: a teacher does not say how its patches lie, and they are to be averaged.
        """
        packed: dict[str, Tensor] = {}
        for name, values in targets.items():
            kept, result = values, name.rpartition(".")[2]
            if result == "classes" and self.top is not None:
                kept, packed[name + INDEX] = _largest(values, self.top)
            if result == "patches" and self.pool > 1:
                kept = _averaged(values, self.pool)
            if self.type == "int8":
                kept, packed[name + SCALE] = _to_int8(kept)
            packed[name] = kept.to(torch.bfloat16) if self.type == "bf16" else kept
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the targets: what `pack` was given, but for what its form leaves out."""
        targets = {name: each for name, each in packed.items() if not name.endswith((INDEX, SCALE))}
        for name, values in targets.items():
            if (scale := packed.get(name + SCALE)) is not None:
                targets[name] = values = values * scale[..., None]
            if (index := packed.get(name + INDEX)) is not None:
                targets[name] = self._spread(values, index)
        return targets

    def _spread(self, kept: Tensor, index: Tensor) -> Tensor:
        """Return the logits (B, C) of the k largest and of the others together, (B, k + 1)."""
        largest, rest = kept.float().split((index.shape[1], 1), dim=1)
        others = rest - math.log(self.classes - index.shape[1])
        return others.repeat(1, self.classes).scatter(1, index.long(), largest)


def _largest(logits_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits and the log-sum-exp of the others (B, k + 1), and the classes of the largest (B, k)."""
    largest, index = logits_BC.topk(count, dim=1)
    rest = logits_BC.float().scatter(1, index, -torch.inf).logsumexp(1, keepdim=True)
    few = logits_BC.shape[1] <= torch.iinfo(torch.int16).max
    kept = torch.cat((largest, rest.to(largest.dtype)), dim=1)
    return kept, index.to(torch.int16 if few else torch.int32)


def _averaged(patches: Tensor, side: int) -> Tensor:
    if patches.dim() == 3:
        raise ConfigError(
            f"transfer.cache_pool={side} averages patches that are neighbors, and this teacher does not say how its "
            "patches lie: leave it out"
        )
    grid = math.ceil(patches.shape[1] / side), math.ceil(patches.shape[2] / side)
    return average_to(patches, grid).to(patches.dtype)


def _to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors (..., C) in int8, and the scale of each (...) in float32."""
    scale = values.float().abs().amax(-1) / LARGEST_INT8
    steps = values.float() / torch.where(scale == 0, 1.0, scale)[..., None]
    return steps.round().to(torch.int8), scale


logger = logging.getLogger(__name__)

# What a run with `transfer.cache` must be, before anything is read.

MARGIN = 0.9
"""The part of the free disk that targets may take by default."""


def check_cache(config: RunConfig, methods: Sequence[TransferMethod]) -> None:
    """Raise ConfigError for settings with which a teacher's targets cannot be kept."""
    data, transfer = config.data, config.transfer
    if transfer.cache is None:
        return
    is_file = (
        not is_url(transfer.cache) and Path(transfer.cache).exists() and not Path(transfer.cache).is_dir()
    )
    if not transfer.cache.strip() or is_file or transfer.cache.startswith(("http:", "https:")):
        raise ConfigError(
            f"transfer.cache={transfer.cache!r} is neither a folder, which is made if needed, nor a bucket: name one"
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
    if is_url(folder):
        return
    free = shutil.disk_usage(nearest_folder(Path(folder))).free
    if here and missing > MARGIN * free:
        raise ConfigError(
            f"transfer.cache={folder} lacks {gibibytes(missing)}, more than 90% of the {gibibytes(free)} that are free "
            "there: make room, name another folder, lower data.views, or set transfer.cache_limit"
        )


# The objects of a cache.

ABOUT = "about.json"
LENGTH, SUMS = struct.Struct("<I"), struct.Struct("<II")
"""The length of a description; the checksums at the beginning of a row, of the image's pixels and of the row."""
LONGEST = 1 << 20
"""Bytes of a description, at most."""
PIXELS = "pixels"
"""The checksums of pixels, beside the targets."""
NO_DESCRIPTION = (struct.error, ValueError, LookupError, TypeError, RecursionError)


class Shard(NamedTuple):
    """The samples of an object: a range of them in one view."""

    view: int
    first: int
    size: int


class LostTargetsError(DataError):
    """An object of targets is missing or damaged."""

    def __init__(self, shard: Shard, why: str) -> None:
        super().__init__(f"transfer.cache: {why}")
        self.shard = shard


class Field(NamedTuple):
    """The part of a row that one target takes."""

    name: str
    type: str
    shape: Sequence[int]

    @property
    def size(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * TYPES[self.type].itemsize

    @classmethod
    def of(cls, name: str, values: Tensor) -> Field:
        """Return the field of values (B, ...)."""
        return cls(name, str(values.dtype), list(values.shape[1:]))


def row_size(fields: Iterable[Field]) -> int:
    """Return the bytes of a sample."""
    return SUMS.size + sum(field.size for field in fields)


@dataclass(frozen=True)
class TargetShards:
    """The targets of one set of images by one set of teachers."""

    root: str
    """The place `transfer.cache`."""
    described: JsonDict
    """All that the targets depend on, beside their samples."""
    ranges: Sequence[Samples]
    """The samples of each object."""
    form: TargetForm
    numbered: bool = False
    """Whether the augmentation of a sample depends on its number."""

    @property
    def folder(self) -> str:
        """The place of these targets alone."""
        return f"{self.root.rstrip('/')}/{digest(self.described)}"

    @cached_property
    def ends(self) -> list[int]:
        """The number of the first sample after each range."""
        return list(accumulate(each.size for each in self.ranges))

    @property
    def samples(self) -> int:
        """The number of all samples."""
        return self.ends[-1]

    def shards(self, views: Iterable[int]) -> list[Shard]:
        """Return all shards of some views."""
        found = [(end - each.size, each.size) for end, each in zip(self.ends, self.ranges, strict=True)]
        return [Shard(view, *each) for view in views for each in found if each[1]]

    def shard_of(self, view: int, index: int) -> Shard:
        """Return the shard of a sample."""
        number = bisect_right(self.ends, index)
        size = self.ranges[number].size
        return Shard(view, self.ends[number] - size, size)

    def place(self, shard: Shard) -> str:
        """Return the place of an object."""
        return f"{self._folder_of(shard.view)}/{self._name(shard)}"

    def stored(self, shards: Iterable[Shard]) -> dict[Shard, int]:
        """Return the bytes of each object that is there. Objects are listed, and not read."""
        shards = list(shards)
        views = {shard.view: self._folder_of(shard.view) for shard in shards}
        there: dict[int, Mapping[str, int]] = {}
        for view, folder in views.items():
            with reached(folder):
                there[view] = store_of(folder).sizes(folder)
        named = ((shard, there[shard.view].get(self._name(shard))) for shard in shards)
        return {shard: size for shard, size in named if size is not None}

    def holds(self, shard: Shard) -> bool:
        """Return whether there is an object of a shard."""
        place = self.place(shard)
        try:
            return bool(store_of(place).stamp(place))
        except FileNotFoundError:
            return False

    def size(self, shard: Shard, fields: Sequence[Field]) -> int:
        """Return the bytes of an object."""
        return LENGTH.size + len(self._describe(shard, fields)) + shard.size * row_size(fields)

    def open(self) -> None:
        """Make the folder and say in it what it is of.

        A damaged description is written again: each object says itself what it is of.

        Raises ConfigError: the folder says that it is of something else. WriteFailedError: it cannot be written.
        """
        place, text = f"{self.folder}/{ABOUT}", json.dumps(self.described, indent=1).encode()
        found = load(place)
        if found == text:
            return
        if found is not None and _is_json(found):
            raise ConfigError(
                f"transfer.cache: {place} describes other targets: remove the folder {self.folder}, and they are "
                "computed again"
            )
        if found is not None:
            logger.warning("transfer.cache: %s is damaged; it is written again", place)
        write(place, text)

    def write(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Write an object of targets (B, ...) and checksums of pixels. Raises WriteFailedError."""
        targets = {name: each.cpu().contiguous() for name, each in tensors.items() if name != PIXELS}
        fields = [Field.of(name, each) for name, each in targets.items()]
        described = self._describe(shard, fields)
        content = bytearray(LENGTH.pack(len(described)) + described)
        parts = [each.reshape(shard.size, -1).view(torch.uint8) for each in targets.values()]
        pixels = tensors[PIXELS].tolist()
        for row, pixel in zip(torch.cat(parts, 1).numpy(), pixels, strict=True):
            content += SUMS.pack(pixel, _checksum(described, pixel, row.data)) + row.tobytes()
        write(self.place(shard), bytes(content))

    def open_object(self, shard: Shard) -> Opened:
        """Return how the rows of an object are read. Raises LostTargetsError."""
        place = self.place(shard)
        try:
            with reached(place):
                store = store_of(place)
                stamp = store.stamp(place)
                (length,) = LENGTH.unpack(store.read(place, 0, LENGTH.size, stamp))
                described = store.read(place, LENGTH.size, min(length, LONGEST), stamp)
                fields = [Field(*each) for each in json.loads(described)["fields"]]
                same_size = stamp.partition("-")[0] == str(self.size(shard, fields))
                whole = same_size and described == self._describe(shard, fields)
                opened = Opened(place, stamp, described, fields)
        except SourceLostError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise LostTargetsError(shard, str(error)) from error
            if not isinstance(error.__cause__, NO_DESCRIPTION):
                raise
            whole = False
        if not whole:
            raise LostTargetsError(shard, f"{place} is damaged or of other images")
        return opened

    def _folder_of(self, view: int) -> str:
        return f"{self.folder}/view-{view:03d}"

    def _name(self, shard: Shard) -> str:
        samples = self.ranges[bisect_right(self.ends, shard.first)]
        known = {"samples": samples.name, "size": samples.size}
        return f"shard-{digest({**known, 'first': shard.first} if self.numbered else known)}.rows"

    def _describe(self, shard: Shard, fields: Sequence[Field]) -> bytes:
        known = {"targets": digest(self.described), "view": shard.view, "object": self._name(shard)}
        return json.dumps({**known, "fields": fields}).encode()


def _checksum(described: bytes, pixel: int, row: bytes | memoryview) -> int:
    return zlib.crc32(row, zlib.crc32(LENGTH.pack(pixel), zlib.crc32(described)))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


# All that teacher targets depend on: another teacher, other images or another precision have another folder.

FORMAT = 2


def find_shards(
    config: RunConfig,
    dual: DualViT,
    teachers: Mapping[str, Pretrained],
    spec: Preprocessing,
    loader: TrainLoader,
) -> TargetShards:
    """Return the objects of the targets of a run. Raises ConfigError: its images are a stream."""
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
        "images": _describe_images(config, spec),
    }
    numbered = config.data.views != 0
    return TargetShards(str(config.transfer.cache), described, loader.sample_ranges(), form, numbered)


def _form_of(config: RunConfig, dual: DualViT) -> TargetForm:
    how = config.transfer
    classes = 0 if how.cache_top is None else num_classes(dual.student)
    return TargetForm(how.cache_type, how.cache_top, how.cache_pool, classes)


def has_weights(shards: TargetShards) -> bool:
    """Return whether the teachers' weights were read, so that the name of the folder is known."""
    return all(each["digest"] is not None for each in shards.described["teachers"].values())


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


def _describe_images(config: RunConfig, spec: Preprocessing) -> JsonDict:
    described: JsonDict = {"dataset": config.data.dataset, **spec.described()}
    drawn = describe_drawn(config.data, config.seed)
    return described if drawn is None else {**described, "augmentation": drawn}


# What loader processes add to images: a checksum of their pixels, and the targets that were computed of them.

REQUESTS = 16
"""Rows that a process asks of a bucket at a time."""
LOST = "lost"
"""In place of targets that cannot be read: the view, and the numbers of the samples."""


def add_checksums(
    view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
) -> dict[str, Tensor]:
    """Return a checksum of each of the images (B, C, H, W)."""
    sums = [zlib.crc32(image.contiguous().numpy().data) for image in images]
    return {PIXELS: torch.tensor(sums, dtype=torch.int64)}


class Opened(NamedTuple):
    """An object whose description was read and is right."""

    place: str
    stamp: str
    described: bytes
    fields: Sequence[Field]

    def read(self, number: int) -> tuple[int, bytes] | None:
        """Return the checksum of pixels and the targets of a row; None if the row is damaged."""
        size = row_size(self.fields)
        start = LENGTH.size + len(self.described) + number * size
        with reached(self.place):
            content = store_of(self.place).read(self.place, start, size, self.stamp)
        if len(content) < size:
            return None
        pixel, known = SUMS.unpack_from(content)
        row = content[SUMS.size :]
        return (pixel, row) if _checksum(self.described, pixel, row) == known else None


class TargetRows:
    """Adds to each image its targets.

    A loader process leaves targets that are lost to the main process, which has `refill`: it computes an object again.
    """

    def __init__(self, shards: TargetShards, refill: Callable[[Shard], None] | None = None) -> None:
        self._shards, self._refill = shards, refill
        self._refilled: set[Shard] = set()
        self._opened: dict[Shard, Opened] = {}

    def __call__(
        self, view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
    ) -> dict[str, Tensor]:
        """Return the targets (B, ...) by name, in the form in which they are kept; `LOST` where one is lost.

        Raises DataError: an image has other pixels than when its targets were computed, or a place cannot be reached.
        """
        try:
            return self.read(view, indices, images, name)
        except LostTargetsError:
            return {LOST: torch.tensor([view, *indices])}

    def _complete(
        self, found: dict[str, Tensor], images: Tensor, name: Callable[[int], str]
    ) -> dict[str, Tensor]:
        """Return what a call has found for images; what is lost is computed again."""
        while LOST in found:
            view, *indices = found[LOST].tolist()
            try:
                return self.read(view, indices, images, name)
            except LostTargetsError as error:
                if self._refill is None or error.shard in self._refilled:
                    raise
                logger.warning("%s; its targets are computed again", error)
                self._refill(error.shard)
                self._refilled.add(error.shard)
        return found

    def read(
        self, view: int, indices: Sequence[int], images: Tensor, name: Callable[[int], str]
    ) -> dict[str, Tensor]:
        """Do the same as a call, but raise LostTargetsError for what is lost."""
        row = partial(self._row, view)
        if is_url(self._shards.root):
            with ThreadPoolExecutor(REQUESTS) as pool:
                rows = list(pool.map(row, indices))
        else:
            rows = list(map(row, indices))
        sums = add_checksums(view, indices, images, name)[PIXELS].tolist()
        for index, pixel, (_, known, _) in zip(indices, sums, rows, strict=True):
            if pixel != known:
                raise DataError(
                    f"{name(index)} is not the image that its targets in transfer.cache were computed of: it was "
                    "changed, or another version of Pillow, torchvision or timm makes other pixels of it; remove the "
                    f"folder {self._shards.folder}, or name another transfer.cache"
                )
        return _split(rows[0][0], b"".join(row for _, _, row in rows), len(rows))

    def batches(self, loader: TrainLoader, epoch: int, start: int = 0) -> Iterator[FullBatch]:
        """Yield the batches of an epoch with their targets, as kept, from batch `start`. Raises as a call."""
        loader.batches.beside = self
        for images, labels, found in loader.full_epoch(epoch, start):
            yield images, labels, self._complete(found, images, loader.batches.name)

    @property
    def form(self) -> TargetForm:
        """The form in which targets are kept."""
        return self._shards.form

    def __getstate__(self) -> JsonDict:
        return {**self.__dict__, "_opened": {}, "_refill": None}

    def _row(self, view: int, index: int) -> tuple[Sequence[Field], int, bytes]:
        """Return the fields of a sample's targets, the checksum of its pixels, and the targets."""
        shard = self._shards.shard_of(view, index)
        try:
            opened = self._opened.get(shard) or self._shards.open_object(shard)
            row = opened.read(index - shard.first)
        except SourceLostError:  # it may have been computed again meanwhile
            opened = self._shards.open_object(shard)
            row = opened.read(index - shard.first)
        if row is None:
            self._opened.pop(shard, None)
            raise LostTargetsError(shard, f"{opened.place} is damaged: a checksum does not match")
        self._opened[shard] = opened
        return opened.fields, *row


def _split(fields: Sequence[Field], rows: bytes, count: int) -> dict[str, Tensor]:
    """Return the targets (B, ...) of `count` rows."""
    table, found, start = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(count, -1), {}, 0
    for field in fields:
        part = table[:, start : start + field.size].contiguous()
        found[field.name] = part.view(TYPES[field.type]).view(count, *field.shape)
        start += field.size
    return found
