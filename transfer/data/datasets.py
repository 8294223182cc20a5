"""From `dataset`, `data_path` and a split to images: whatever timm reads, and scikit-learn's digits."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, cast

from timm.data.dataset_factory import create_dataset
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset

from ...models.errors import ConfigError, DataError, did_you_mean
from ..config import DataConfig
from .digits import DigitsSource
from .images import ImageSource, ReaderSource, TorchvisionSource

logger = logging.getLogger(__name__)

PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
FAMILIES = ("folder", "digits", "torch/...", *(f"{name}/..." for name in PACKAGES))
MODES = {1: "L", 3: "RGB"}
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "eval", "evaluation")


def check_dataset(config: DataConfig) -> None:
    """Raise what `open_dataset` would for an unknown name, a missing package or folder, without reading any image."""
    if _check_family(config.dataset if config.dataset != "folder" else "") == "":
        _check_folder(config, config.train_split)


def open_dataset(
    config: DataConfig, split: str, channels: int, *, training: bool, seed: int = 0
) -> ImageSource | IterableDataset[Any]:
    """The images of a split with `channels` 1 (grey) or 3 (RGB); a stream for wds, hfids and tfds.

    Raises DataError for a folder, package or split that is not there, ConfigError for an unknown `dataset`.
    """
    if channels not in MODES:
        raise DataError(f"images of {channels} channels cannot be read; a model's in_chans must be 1 or 3")
    name = config.dataset if config.dataset != "folder" else ""
    family = _check_family(name)
    if family == "digits":
        return DigitsSource(split, MODES[channels])
    if family == "":
        _check_folder(config, split)
    dataset = _create(config, name, split, MODES[channels], training, seed)
    if isinstance(dataset, IterableDataset):
        return dataset
    if hasattr(dataset, "reader"):
        return ReaderSource(dataset.reader, MODES[channels])
    return TorchvisionSource(dataset, MODES[channels])


def _check_family(name: str) -> str:
    """The part of a data set's name before the slash. timm would read any other name as a folder."""
    family, slash, _ = name.partition("/")
    family = family.lower()
    known = name in ("", "digits") if not slash else family in (*PACKAGES, "torch")
    if not known:
        raise ConfigError(f"data.dataset={name!r} is not known; {did_you_mean(name, FAMILIES)}")
    if family in PACKAGES and importlib.util.find_spec(PACKAGES[family]) is None:
        package = PACKAGES[family]
        raise DataError(f"data.dataset={name} needs the package {package}: pip install {package}")
    return family


def _check_folder(config: DataConfig, split: str) -> None:
    if config.data_path is None:
        raise DataError(
            "data.data_path is not set: give the data set's folder, or data.dataset=digits to try"
        )
    root = Path(config.data_path)
    if not root.exists():
        raise DataError(f"data.data_path={config.data_path} does not exist")
    if root.is_file():
        return
    wanted = _synonyms(split)
    if any((root / name).exists() for name in wanted):
        return
    others = [name for name in (*TRAIN_NAMES, *EVAL_NAMES) if name not in wanted and (root / name).is_dir()]
    if others:
        # timm would read the whole folder, and so evaluate on the training images.
        raise DataError(
            f"data.data_path={config.data_path} has no folder for split {split!r}, only {', '.join(others)}"
        )
    logger.warning("%s has no folder for split %r: all of it is used", config.data_path, split)


def _synonyms(split: str) -> tuple[str, ...]:
    split = split.split("[")[0]
    return next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names), (split,))


def _create(config: DataConfig, name: str, split: str, mode: str, training: bool, seed: int) -> Any:
    try:
        return create_dataset(
            name,
            root=config.data_path,
            split=split,
            is_training=training,
            download=config.download,
            batch_size=config.batch_size,
            seed=seed,
            input_img_mode=mode,
            class_map=cast("dict[str, int]", _class_map(config, split) if name == "" else None),
        )
    except ImportError as error:
        raise DataError(f"data.dataset={name} needs a package that is missing: {error}") from error
    except (
        Exception
    ) as error:  # each reader fails in its own way: asserts, RuntimeError, errors of the network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data.dataset={name or 'folder'}, split {split!r}, cannot be read from "
            f"data.data_path={config.data_path}: {reason}"
        ) from error


def _class_map(config: DataConfig, split: str) -> dict[str, int] | None:
    """Labels of the training folder for another split that lacks some of its classes; else the split's own.

    Without it timm numbers each split's folders by themselves, and one missing class shifts all after it.
    """
    root = Path(str(config.data_path))
    if not root.is_dir():
        return None
    folder = _split_folder(root, split)
    train = _split_folder(root, config.train_split)
    if folder in (None, train) or train is None or folder is None:
        return None
    present, known = _subfolders(folder), sorted(_subfolders(train), key=natural_key)
    return {label: place for place, label in enumerate(known)} if present < set(known) else None


def _split_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in (split, *_synonyms(split)) if (root / name).is_dir()), None)


def _subfolders(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir()}
