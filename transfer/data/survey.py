"""What is in a data set: images by class, their sizes and kinds, what cannot be read, and how labels are numbered."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from ...checkpoints.preprocessing import Preprocessing
from ...models.errors import DataError
from ..config import DataConfig
from .augment import create_mixing, epoch_repeats, mix, reason_of, train_transform
from .datasets import open_dataset, undivided
from .image_folder import UNLABELED, Header, ImageSource
from .labels import stream_classes
from .loaders import create_train_loader
from .loading import BadImage, BadImages, Batch, SourceLostError, TrainBatches, cause, followed, name_of
from .sampler import MIXING, BatchRequest, Order, derive_seed, epoch_order, preserved
from .shards import ShardImages
from .streams import StreamBatches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A picture of training images as the model sees them: after augmentation and mixing, in colors for the eye.

COLUMNS = 8
NOTABLE_SHARE = 0.1
"""Share of a mixed label below which a class is not named: label smoothing gives each a little."""


def preview(config: DataConfig, spec: Preprocessing, count: int, *, seed: int = 0) -> Figure:
    """Return the first images of the first epoch of a run with this seed, `count` or all, each under its label.

    Raises DataError: the set cannot be read, or a transform fails.
    """
    dataset = open_dataset(config, config.train_split, spec.input_size[0], training=True, seed=seed)
    if isinstance(dataset, IterableDataset):
        names: Sequence[str] = stream_classes(dataset) or ()
        batch = _of_stream(dataset, config, spec, count, seed, config.num_classes or len(names))
    else:
        names = dataset.class_names or ()
        batch = _of_source(dataset, config, spec, count, seed)
    if batch.failure is not None or batch.images is None:
        last = f"; the last tried is {batch.bad[-1].describe()}" if batch.bad else ""
        raise DataError(batch.failure or f"no image of split {config.train_split!r} can be read{last}")
    captions = [_caption(target, names) for target in batch.targets[batch.valid]]
    return _draw(for_the_eye(batch.images[batch.valid], spec), captions)


def for_the_eye(images_BCHW: Tensor, spec: Preprocessing) -> NDArray[np.float32]:
    """Return images (B, H, W, 3) of values from 0 to 1, from those that the model sees."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    seen = (images_BCHW * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
    return seen.permute(0, 2, 3, 1).numpy()


def _of_source(source: ImageSource, config: DataConfig, spec: Preprocessing, count: int, seed: int) -> Batch:
    largest = max(source.targets or (), default=0)
    classes = config.num_classes or max(1, len(source.class_names or ()), largest + 1)
    batches = TrainBatches(
        source,
        range(len(source)),
        train_transform(config, spec),
        seed=seed,
        mixing=create_mixing(config, classes),
        tries=BadImages(config.max_bad_images, len(source)).limit + 1,
        repeats=epoch_repeats(config),
    )
    repeats = epoch_repeats(config)
    order: Order = (
        source.order(seed, 0, repeats)
        if isinstance(source, ShardImages)
        else epoch_order(len(source), seed, 0, repeats)
    )
    first = order[:count].tolist()
    return batches[BatchRequest(0, 0, tuple(first), len(first))]


def _of_stream(
    stream: Any, config: DataConfig, spec: Preprocessing, count: int, seed: int, classes: int
) -> Batch:
    batch = next(iter(StreamBatches(stream, train_transform(config, spec), count, seed, 0)), None)
    if batch is None:
        raise DataError(f"{config.dataset} gave no image")
    mixing = create_mixing(config, classes) if classes else None
    if mixing is None or batch.images is None:
        return batch
    with preserved():
        images, targets = mix(mixing, batch.images, batch.targets, derive_seed(MIXING, seed, 0, 0, 0))
    return batch._replace(images=images, targets=targets)


def _caption(target: Tensor, names: Sequence[str]) -> str:
    """Return the class, or what it is mixed of."""
    if target.ndim == 0:
        return _name(int(target), names)
    shares = sorted(((float(share), label) for label, share in enumerate(target)), reverse=True)
    shown = [(share, label) for share, label in shares if share >= NOTABLE_SHARE][:2] or shares[:1]
    if len(shown) == 1:
        return _name(shown[0][1], names)
    return "\n".join(f"{share:.0%} {_name(label, names)}" for share, label in shown)


def _name(label: int, names: Sequence[str]) -> str:
    if label < 0:
        return ""
    word = names[label] if label < len(names) else str(label)
    return word if len(word) <= 16 else f"{word[:15]}…"


def _draw(pictures: NDArray[np.float32], captions: Sequence[str]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: a run draws nothing
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.85 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, picture, caption in itertools.zip_longest(axes, pictures, captions):
        axis.set_axis_off()
        if picture is not None:
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(caption, fontsize=8)
    return figure


# A few training images as they are, drawn over the whole set: what a conversion is calibrated on.

PLAIN = {
    "aa": None,
    "color_jitter": 0.0,
    "hflip": 0.0,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "views": None,
    "keep_views": None,
    "aug_repeats": 1,
}


def sample_images(config: DataConfig, spec: Preprocessing, count: int, *, seed: int = 0) -> Tensor:
    """`count` images (count, C, H, W) of `config.train_split`, or all if it has fewer; cropped by little, not flipped.

    Raises DataError: the set cannot be read, or is empty. ConfigError: it is not known.
    """
    plain = config.model_copy(update={**PLAIN, "crop_scale": (0.8, 1.0), "batch_size": count, "workers": 0})
    with preserved():
        loader = create_train_loader(plain, spec, seed=seed, labels=False)
        batch = next(iter(loader.epoch(0)), None)
    if batch is None:
        name = config.dataset or config.data_path
        raise DataError(f"{name} has no images in {config.train_split!r}")
    return torch.as_tensor(batch[0])


NAMED = 20
"""How many unreadable files are named; all are counted."""


@dataclass
class Split:
    """One split. `looked_at` of its `images` were opened; a stream tells only what it gives."""

    name: str
    images: int
    streamed: bool
    class_names: tuple[str, ...] | None
    looked_at: int = 0
    by_label: Counter[int] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    """Images with an EXIF orientation."""
    unreadable: int = 0
    named: list[BadImage] = field(default_factory=list)

    @property
    def unlabeled(self) -> int:
        return self.by_label[UNLABELED]

    def counts(self) -> list[int]:
        """Return images of each class, in the order of the labels, those of no image among them."""
        size = max([len(self.class_names or ()), *(label + 1 for label in self.by_label)])
        return [self.by_label[label] for label in range(size)]

    def add(self, header: Header) -> None:
        self.looked_at += 1
        self.widths.append(header.size[0])
        self.heights.append(header.size[1])
        self.kinds[header.kind or "decoded"] += 1
        self.modes[header.mode] += 1
        self.turned += header.turned

    def refuse(self, bad: BadImage) -> None:
        self.looked_at += 1
        self.unreadable += 1
        if len(self.named) < NAMED:
            self.named.append(bad)


@dataclass
class Survey:
    """The splits that are there, and why others are not."""

    splits: list[Split]
    missing: dict[str, str]


def survey(
    config: DataConfig, *, limit: int | None = None, decode: bool = False, stream_limit: int = 1000
) -> Survey:
    """Look at the training and the validation split.

    Args:
        limit: Images of a split whose files are opened, evenly over it; all by default, of a stream `stream_limit`.
        decode: Read whole files, not their headers alone.

    Raises DataError: neither split can be read, or one is damaged. ConfigError: the data set is not known.
    """
    found = Survey([], {})
    names = (
        ["all"] if undivided(config) else [name for name in (config.train_split, config.val_split) if name]
    )
    for name in dict.fromkeys(names):
        try:
            dataset = _open(config, config.train_split if name == "all" else name)
        except SourceLostError:
            raise
        except DataError as error:
            found.missing[name] = str(error)
            continue
        if isinstance(dataset, IterableDataset):
            found.splits.append(_stream(name, dataset, limit or stream_limit))
        else:
            unknown = stream_limit if isinstance(dataset, ShardImages) else None
            found.splits.append(_source(name, dataset, limit or unknown, decode))
    if not found.splits:
        raise DataError(next(iter(found.missing.values())))
    return found


def _open(config: DataConfig, split: str) -> Any:
    """Return a split as training reads it, or, where training refuses its classes, as it is."""
    try:
        return open_dataset(config, split, 3, training=False)
    except DataError:
        return open_dataset(config, split, 3, training=False, by_training=False)


def check_readable(found: Survey) -> None:
    """DataError where no image of a split can be read, or a stream gives none."""
    for split in found.splits:
        if split.images and not split.looked_at:
            raise DataError(
                f"{split.name} gave none of its {split.images} images: its shards are missing or empty, or "
                "data.image_column names a file that no sample has"
            )
        if split.named and split.unreadable == split.looked_at:
            first = split.named[0].describe()
            raise DataError(
                f"none of the {split.looked_at} images of {split.name} that were opened can be read; the first is "
                f"{first}"
            )


def differences(found: Survey) -> list[str]:
    """Return where two splits name or number their classes differently: each is a sentence."""
    lines = []
    for first, second in itertools.combinations(found.splits, 2):
        names, others = first.class_names, second.class_names
        if names is None or others is None:
            if (names is None) != (others is None):
                lines.append(f"{first.name} {_has(names)} and {second.name} {_has(others)}")
            continue
        if only := _without(names, others):
            lines.append(f"only {first.name} has {_some(only)}")
        if only := _without(others, names):
            lines.append(f"only {second.name} has {_some(only)}: training and evaluation refuse it")
    for each in found.splits:
        empty = [
            name for name, count in zip(each.class_names or (), each.counts(), strict=False) if not count
        ]
        if empty and not each.streamed:
            lines.append(f"{each.name} has no image of {_some(empty)}")
    return lines


def _has(names: Sequence[str] | None) -> str:
    return "has no classes with names" if names is None else f"has {len(names)} classes"


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} classes: {', '.join(names[:5])}{more}" if len(names) > 1 else f"class {names[0]}"


def _source(name: str, source: ImageSource, limit: int | None, decode: bool) -> Split:
    names = None if source.class_names is None else tuple(source.class_names)
    split = Split(name, len(source), False, names)
    if source.targets is not None:
        split.by_label.update(source.targets)
    step = max(1, -(-len(source) // limit)) if limit else 1
    indices = range(0, len(source), step)
    for index in followed(indices, len(indices), f"images of {name}"):
        try:
            header = source.header(index)
            if decode or source.targets is None:
                _, target = source.read(index)
                if source.targets is None:
                    split.by_label[target] += 1
            split.add(header)
        except MemoryError:
            raise
        except Exception as error:  # decoders fail in many ways
            split.refuse(BadImage(name_of(source, index), cause(error)))
    return split


def _stream(name: str, stream: Any, limit: int) -> Split:
    names = stream_classes(stream)
    split = Split(name, len(stream), True, names)
    try:
        rows = itertools.islice(stream, limit)
        for image, target in followed(rows, min(limit, len(stream)), f"images of {name}"):
            split.add(Header.of(image))
            split.by_label[int(target)] += 1
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} cannot be read after {split.looked_at} images: {reason_of(error)}"
        ) from error
    return split
