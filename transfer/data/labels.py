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
from torch import Tensor

from ...checkpoints.files import read_regular
from ...models.errors import ConfigError, DataError, did_you_mean

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
