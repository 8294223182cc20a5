"""From `dataset`, `data_path` and a split to images: whatever timm reads, and the handwritten digits."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from ...checkpoints.files import is_folder
from ...models.errors import ConfigError, DataError, did_you_mean, install_command
from ..config import DataConfig
from ..first_checks import check_folder
from .archives import create, is_packed, must_be_unpacked
from .dense_sets import DENSE_SETS
from .digits import (
    EVAL_NAMES,
    MODEL,
    TRAIN_NAMES,
    TRAINING,
    DigitsSource,
    number_by_name,
    split_folder,
    synonyms,
)
from .image_folder import (
    FolderImages,
    Found,
    ImageSource,
    ReaderSource,
    TorchvisionSource,
    count_shared,
    find_images,
)
from .labels import keep_classes, wanted_classes
from .shards import ShardImages
from .streams import open_hub

logger = logging.getLogger(__name__)

PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}
FAMILIES = ("folder", "digits", "torch/...", "wds/...", *(f"{name}/..." for name in PACKAGES))
MODES = {1: "L", 3: "RGB"}
EXTRAS = {"hfds": "hfds", "hfids": "hfds"}
"""The extra of this package that brings what a family needs."""


def check_dataset(config: DataConfig) -> None:
    """Raise what `open_dataset` would for an unknown name, a missing package or folder, without reading any image."""
    wanted_classes(config)
    family = _check_family(config.dataset if config.dataset != "folder" else "")
    _check_place(config, family)
    if family == "":
        _check_folder(config, config.train_split)


def has_split(config: DataConfig, split: str) -> bool:
    """Return whether a folder has a folder for this split; of any other data set only its reader can tell."""
    if config.dataset not in ("", "folder"):
        return True
    return config.data_path is not None and split_folder(Path(config.data_path), split) is not None


def open_dataset(
    config: DataConfig,
    split: str,
    channels: int,
    *,
    training: bool,
    seed: int = 0,
    by_training: bool = True,
    names: Sequence[str] | None = None,
) -> ImageSource | IterableDataset[Any]:
    """Return the images of a split with `channels` 1 (gray) or 3 (RGB); a stream for hfids and tfds.

    Labels go by name: a class has its place in `names`, those of a model's outputs; else the number that it has in the
    training split, or, without `by_training`, in its own.

    Raises DataError for a folder, package or split that is not there, and for a class that `names` or the training
    split has not; ConfigError for an unknown `dataset`.
    """
    if channels not in MODES:
        raise DataError(f"images of {channels} channels cannot be read; a model's in_chans must be 1 or 3")
    name = config.dataset if config.dataset != "folder" else ""
    family = _check_family(name)
    _check_place(config, family)
    _check_unpacked(config)
    found = _open(config, name, family, split, MODES[channels], training, seed)
    if isinstance(found, IterableDataset):
        if config.classes is not None:
            raise ConfigError(f"data.classes needs labels by index; {config.dataset} is a stream")
        return found
    if isinstance(found, ShardImages):
        if config.classes is not None:
            raise ConfigError(f"data.classes needs labels by index; {config.dataset} has them in its shards")
        return found
    source = keep_classes(config, found)
    if names is not None:
        return number_by_name(source, split, names, MODEL)
    if not by_training or split == config.train_split:
        return source
    trained = _training_names(config, family, found, split, MODES[channels])
    # `data.classes` numbers each split alike
    return source if config.classes is not None else number_by_name(source, split, trained, TRAINING)


def _open(
    config: DataConfig, name: str, family: str, split: str, mode: str, training: bool, seed: int
) -> ImageSource | IterableDataset[Any]:
    if family == "digits":
        return DigitsSource(split, mode)
    if family == "hfds":
        return open_hub(config, split, mode)
    if family == "wds":
        return ShardImages(config, split, mode)
    if family == "":
        _check_folder(config, split)
        if Path(str(config.data_path)).is_dir():
            return _open_folder(config, split, mode)
    dataset = create(config, name, split, mode, training=training, seed=seed)
    if isinstance(dataset, IterableDataset):
        return dataset
    if hasattr(dataset, "reader"):
        return ReaderSource(dataset.reader, mode)
    return TorchvisionSource(dataset, mode)


def _open_folder(config: DataConfig, split: str, mode: str) -> FolderImages:
    root = Path(str(config.data_path))
    folder = split_folder(root, split)
    source = FolderImages(find_images(folder or root), mode)
    if folder is None:
        logger.warning("%s has no folder for split %r: all of it is used", root, split)
    return source


def is_name(word: str) -> bool:
    """Return whether a word names a data set, and no folder."""
    family, slash, _ = word.partition("/")
    return word in ("digits", *DENSE_SETS) if not slash else family.lower() in (*PACKAGES, "torch", "wds")


def _check_family(name: str) -> str:
    """Return the part of a data set's name before the slash. timm would read any other name as a folder."""
    family = name.partition("/")[0].lower()
    if name in DENSE_SETS:
        raise ConfigError(
            f"data.dataset={name} is of {DENSE_SETS[name]}, which `train` reads with dense.head and `evaluate` for a "
            "detector or segmenter: give images of classes here"
        )
    if name and not is_name(name):
        raise ConfigError(f"data.dataset={name!r} is not known; {did_you_mean(name, FAMILIES)}")
    if family in PACKAGES and importlib.util.find_spec(PACKAGES[family]) is None:
        package = PACKAGES[family]
        command = install_command(EXTRAS[family]) if family in EXTRAS else f"pip install {package}"
        raise DataError(f"data.dataset={name} needs the package {package}: {command}")
    return family


def _check_place(config: DataConfig, family: str) -> None:
    """DataError where what is read from a folder has none."""
    if family == "":
        check_folder(config)
    if config.data_path is None and family in ("torch", "wds"):
        raise DataError(f"data.data_path is not set: {config.dataset} needs a folder to be read from")


def _check_unpacked(config: DataConfig) -> None:
    """DataError where there is nothing to read before staging has unpacked it."""
    if is_packed(config):
        raise DataError(
            f"data.data_path={config.data_path} is unpacked when the run begins (data.stage), and cannot be read "
            "before: set data.num_classes where the number of classes must be known"
        )


def _check_folder(config: DataConfig, split: str) -> None:
    root = Path(str(config.data_path))
    if must_be_unpacked(config):
        if config.stage is None:
            raise DataError(
                f"data.data_path={config.data_path} must be unpacked before its splits are read: set data.stage to a "
                "folder of this machine, or unpack it yourself"
            )
        return
    if root.is_file() and root.suffix == ".tar":
        return
    if not root.is_dir():
        raise DataError(
            f"data.data_path={config.data_path} is a file, not a folder or a .tar file of folders"
        )
    wanted = synonyms(split)
    if any((root / name).exists() for name in wanted):
        return
    usual = (*TRAIN_NAMES, *EVAL_NAMES, "test")
    others = [name for name in usual if name not in wanted and (root / name).is_dir()]
    if others:
        # timm would read the whole folder, and so evaluate on the training images.
        raise DataError(
            f"data.data_path={config.data_path} has no folder for split {split!r}, only {', '.join(others)}; "
            + (
                "data.train_split names another"
                if split == config.train_split
                else "data.val_split names another, or none to train without evaluation"
            )
        )


def undivided(config: DataConfig) -> bool:
    """Return whether a folder has no folders for splits, so that each split is all of it."""
    root = Path(config.data_path or "")
    if config.dataset not in ("", "folder") or not root.is_dir():
        return config.dataset in ("", "folder") and root.is_file()
    usual = (*TRAIN_NAMES, *EVAL_NAMES, config.train_split, config.val_split)
    return not any((root / name).is_dir() for name in usual if name)


def folders_of(config: DataConfig, splits: Iterable[str | None]) -> list[Path]:
    """Return the folders in which `open_dataset` looks for the images of the splits, each once; none for another kind
    of data set."""
    root = Path(config.data_path or "")
    if config.dataset not in ("", "folder") or config.data_path is None or not is_folder(root):
        return []
    whole = root if undivided(config) else None
    found = [split_folder(root, split) or whole for split in splits if split]
    return list(dict.fromkeys(filter(None, found)))


def _training_names(
    config: DataConfig, family: str, found: ImageSource, split: str, mode: str
) -> Sequence[str] | None:
    """Return the classes of the training split, by which another split of a folder or of `hfds` is numbered."""
    if family == "hfds" and config.classes is None:
        try:
            return open_hub(config, config.train_split, mode).class_names
        except DataError:
            return None  # there is no training split
    if not isinstance(found, FolderImages):
        return None
    root = Path(str(config.data_path))
    train = split_folder(root, config.train_split)
    if train is None or train == split_folder(root, split):
        return None
    trained = find_images(train)
    if shared := _shared(config, split, found.found, trained):
        logger.warning("%s", shared)
    return trained.class_names() or None


def _shared(config: DataConfig, split: str, found: Found, trained: Found) -> str | None:
    """Say that images of a split are training images, which links can bring about."""
    count = count_shared(found, trained)
    if not count:
        return None
    words = (
        f"1 image of split {split!r} is an image"
        if count == 1
        else f"{count} images of split {split!r} are images"
    )
    return f"{words} of split {config.train_split!r}, by links in {config.data_path}"


def check_apart(config: DataConfig, source: ImageSource | IterableDataset[Any]) -> None:
    """DataError where training images of a folder, `source`, are images of `data.val_split` too."""
    folder = split_folder(Path(str(config.data_path)), config.val_split or "")
    if isinstance(source, FolderImages) and folder is not None:
        shared = _shared(config, str(config.val_split), find_images(folder), source.found)
        if shared:
            raise DataError(f"knn and probe need other images for training than for the test: {shared}")
