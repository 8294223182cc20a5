"""Opening data sets: what is read, and what is refused in one sentence."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graftvit.models.errors import ConfigError, DataError, GraftError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.images import ImageSource
from PIL import Image


def folder(root: Path, split: str, classes: dict[str, int]) -> None:
    random = np.random.RandomState(0)
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.randint(0, 256, (9, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def source(split: str = "train", channels: int = 3, **keys: Any) -> ImageSource:
    opened = open_dataset(DataConfig(**keys), split, channels, training=True)
    assert not hasattr(opened, "__iter__")
    return opened  # type: ignore[return-value]


def refusal(kind: type[GraftError], split: str = "train", **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        source(split, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_folder_gives_images_labels_and_paths(tmp_path: Path, channels: int, mode: str) -> None:
    folder(tmp_path, "train", {"cat": 2, "dog": 3})
    images = source(channels=channels, data_path=str(tmp_path))
    assert len(images) == 5
    assert images.targets == [0, 0, 1, 1, 1]
    assert images.class_names == ("cat", "dog")
    image, target = images.read(4)
    assert (image.mode, image.size, target) == (mode, (7, 9), 1)
    assert images.path(4) == str(tmp_path / "train" / "dog" / "2.png")


def test_a_split_that_lacks_a_class_keeps_the_training_labels(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"class2": 1, "class10": 1, "zebra": 1})
    folder(tmp_path, "val", {"class10": 1, "zebra": 2})
    config = {"data_path": str(tmp_path)}
    by_name = {
        Path(images.path(i)).parent.name: images.read(i)[1] for images in [source(**config)] for i in range(3)
    }
    evaluation = source("validation", **config)
    assert evaluation.targets == [by_name["class10"], by_name["zebra"], by_name["zebra"]] == [1, 2, 2]


def test_synonyms_of_a_split_are_found_and_the_training_images_are_never_evaluated(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 1})
    message = refusal(DataError, "validation", data_path=str(tmp_path))
    assert "no folder for split 'validation', only train" in message
    folder(tmp_path, "val", {"a": 4})
    assert len(source("validation", data_path=str(tmp_path))) == 4


def test_a_folder_without_splits_is_read_whole_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path, ".", {"a": 1, "b": 1})
    with caplog.at_level(logging.WARNING):
        assert len(source(data_path=str(tmp_path))) == 2
    assert "all of it is used" in caplog.text


def test_a_torchvision_set_is_read(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 2, "b": 1})
    images = source(dataset="torch/image_folder", data_path=str(tmp_path))
    assert len(images) == 3
    assert images.targets == [0, 0, 1]
    assert images.read(2)[1] == 1
    assert images.path(2).endswith("b/0.png")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "data.data_path is not set" in refusal(DataError)
    assert "data.data_path=/nowhere does not exist" in refusal(DataError, data_path="/nowhere")
    empty = refusal(DataError, data_path=str(tmp_path))
    assert "Found 0 images" in empty
    cifar = refusal(DataError, dataset="torch/cifar10", data_path=str(tmp_path))
    assert "torch/cifar10" in cifar
    assert "download" in cifar


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install datasets" in refusal(DataError, dataset="hfds/mnist")
    assert "pip install webdataset" in refusal(DataError, dataset="wds/shards", data_path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("digit", "did you mean 'digits'"), ("cifar10", "valid:"), ("tourch/cifar10", "'tourch/cifar10'")],
)
def test_an_unknown_name_is_not_read_as_a_folder(tmp_path: Path, name: str, hint: str) -> None:
    folder(tmp_path, "train", {"a": 1})
    assert hint in refusal(ConfigError, dataset=name, data_path=str(tmp_path))


def test_an_unknown_torchvision_set_is_named(tmp_path: Path) -> None:
    assert "torch/cifar11" in refusal(DataError, dataset="torch/cifar11", data_path=str(tmp_path))


def test_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="4 channels"):
        source(channels=4, dataset="digits")
