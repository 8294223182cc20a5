"""Other labels for ImageNet, as timm ships them: the classes of ImageNet-A and -R, and the ReaL labels."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, TypeAdapter, ValidationError
from timm.utils.misc import natural_key
from torch import Tensor

from ...checkpoints.class_names import comparable, difference
from ...checkpoints.files import read_regular
from ...models.errors import ConfigError, DataError, did_you_mean
from ..config import DataConfig
from .image_folder import ImageSource, SourceView

# How many classes a data set has, by its names, its labels and `data.num_classes`.


def check_num_classes(config: DataConfig, names: Sequence[str] | None) -> None:
    """ConfigError where `data.num_classes` is not the number of a data set's named classes."""
    if names and config.num_classes not in (None, len(names)):
        raise ConfigError(
            f"data.num_classes={config.num_classes}, but the data set has {len(names)} named classes: leave it out "
            f"(--num_classes none) or give {len(names)}"
        )


def count_classes(
    config: DataConfig, names: Sequence[str] | None, targets: Sequence[int] | None, labels: bool
) -> int:
    """`num_classes` as given or as the set says; ConfigError where neither is there, or they disagree.

    Where no `labels` are needed, 0 for a set that has none, and what the set says counts.
    """
    largest = max(targets, default=-1) if targets is not None else -1
    known = max(len(names or ()), largest + 1)
    unlabeled = sum(target < 0 for target in targets or ())
    if unlabeled and largest >= 0 and labels:
        raise DataError(
            f"{unlabeled} of {len(targets or ())} images have no label, and this needs one for each"
        )
    if unlabeled:
        if labels and config.dataset not in ("", "folder"):
            raise DataError(f"{config.dataset} has no labels, and this needs them: set data.label_column")
        if labels:
            raise DataError(
                f"data.data_path={config.data_path} has no class folders, and this needs labels: put the images of "
                "each class into a folder of its own"
            )
        return 0
    if not labels:
        return max(known, config.num_classes or 0)
    check_num_classes(config, names)
    count = config.num_classes or known
    if count == 0:
        raise ConfigError(f"data.num_classes must be set: {config.dataset} does not say how many it has")
    if largest >= count:
        raise ConfigError(f"data.num_classes={count}, but the data set has the label {largest}")
    return count


def check_stream(config: DataConfig, stream: object, names: Sequence[str] | None) -> None:
    """DataError where a stream numbers its classes otherwise than `names`."""
    own = stream_classes(stream)
    if own is not None and names is not None and comparable(own, names) and list(own) != list(names):
        raise DataError(
            f"{config.dataset} has {difference(own, names)} of the model, and a stream keeps its numbers: "
            "read it with hfds/, or as a folder"
        )


def stream_classes(stream: object) -> tuple[str, ...] | None:
    """Return the names of a stream's classes, where it has some."""
    return tuple(getattr(getattr(stream, "reader", None), "class_to_idx", ())) or None


# Some classes of a larger set (`data.classes`), such as the hundred of ImageNet-100.

IMAGENET_100 = "imagenet-100"
"""The name of the list that comes with the package."""


def keep_classes(config: DataConfig, source: ImageSource) -> ImageSource:
    """`source` without the classes that `data.classes` leaves out, in the order that folders of these alone have.

    Raises DataError: the set has no classes with names, or not these.
    """
    names = wanted_classes(config)
    if names is None:
        return source
    if source.class_names is None or source.targets is None:
        raise DataError("data.classes needs a data set whose classes have names, and this one has none")
    for name in names:
        if name not in source.class_names:
            near = did_you_mean(name, source.class_names)
            raise DataError(f"data.classes names {name!r}, which is no class of the data set; {near}")
    known = {name: label for label, name in enumerate(source.class_names)}
    labels = {known[name]: label for label, name in enumerate(names)}
    kept = [index for index, target in enumerate(source.targets) if target in labels]
    return SourceView(source, tuple(names), kept, labels)


def wanted_classes(config: DataConfig) -> list[str] | None:
    """Return the names in `data.classes`, sorted as timm sorts folders; None where all are kept.

    Raises ConfigError: the file cannot be read, or no name is given.
    """
    given = config.classes
    if given is None:
        return None
    if given == IMAGENET_100:
        given = _read(Path(__file__).with_name("imagenet100.txt"))
    if isinstance(given, str):
        given = _read(Path(given)) if given.endswith(".txt") or Path(given).is_file() else given.split(",")
    names = sorted({name.strip() for name in given} - {""}, key=natural_key)
    if not names:
        raise ConfigError(
            f"data.classes={config.classes!r} names no class; give names, or a file with a name a line"
        )
    return names


def _read(path: Path) -> list[str]:
    """Yield the lines of a file, without comments."""
    try:
        lines = read_regular(path, refusal=ConfigError).splitlines()
    except ConfigError as error:
        raise ConfigError(f"data.classes: {error}") from error
    return [line for line in lines if not line.startswith("#")]


Subset = Literal["imagenet-a", "imagenet-r"]
"""Natural adversarial examples (arXiv:1907.07174) and renditions (arXiv:2006.16241), 200 classes each."""

IMAGENET_CLASSES = 1000
_LABELS = TypeAdapter(list[list[Annotated[int, Field(ge=0, lt=IMAGENET_CLASSES)]]])
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def subset_classes(name: str) -> tuple[int, ...]:
    """Return the ImageNet-1k classes of a subset, in the order of its folders."""
    if name not in get_args(Subset):
        raise ConfigError(f"--subset is {name!r}; {did_you_mean(name, get_args(Subset))}")
    text = _shipped(f"{name.replace('-', '_')}_indices.txt")
    return tuple(int(line) for line in text.split())


def imagenet_names() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's classes in their order."""
    return tuple(_shipped("imagenet_synsets.txt").split())


def find_subset(folders: Sequence[str] | None) -> str | None:
    """Return the subset whose WordNet ids are the names of these class folders; None for any other folders."""
    for name in get_args(Subset):
        if folders is not None and set(folders) == set(
            _shipped(f"{name.replace('-', '_')}_synsets.txt").split()
        ):
            return str(name)
    return None


def real_labels(paths: Sequence[str], file: Path | None = None) -> Tensor:
    """ReaL labels (arXiv:2006.07159) of ImageNet validation images by file name: (images, 1000) bool.

    `file` is a `real.json`; timm's copy by default. A row is empty for an image without label; it is not
    scored. Raises DataError for an image that is not of the validation set.
    """
    labels = json.loads(_shipped("imagenet_real_labels.json")) if file is None else _read_labels(file)
    result = torch.zeros(len(paths), IMAGENET_CLASSES, dtype=torch.bool)
    for row, path in enumerate(paths):
        match = VALIDATION_NAME.search(Path(path).name)
        if match is None or not 0 < int(match[1]) <= len(labels):
            raise DataError(f"{path} has no ReaL label: names must be like ILSVRC2012_val_00000001.JPEG")
        result[row, labels[int(match[1]) - 1]] = True
    return result


def _read_labels(file: Path) -> list[list[int]]:
    """Return the labels of each image. Raises DataError: there is no such file, or it holds something else."""
    try:
        return _LABELS.validate_json(read_regular(file, refusal=DataError))
    except DataError as error:
        raise DataError(f"the ReaL labels: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"the ReaL labels: {file} is no list of labels for each image: {first['msg']}"
        ) from error


def _shipped(name: str) -> str:
    return (importlib.resources.files("timm.data") / "_info" / name).read_text(encoding="utf-8")
