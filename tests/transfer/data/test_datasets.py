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
from graftvit.transfer.data.datasets import check_dataset, open_dataset
from graftvit.transfer.data.image_folder import UNLABELED, ImageSource
from PIL import Image
from support.files.data_sets import encoded, write_classes, write_images, write_tar


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
    check_dataset(DataConfig(data_path=str(tmp_path)))
    assert len(source(data_path=str(tmp_path))) == 2
    assert caplog.text.count("all of it is used") == 1


def test_an_empty_folder_is_only_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "Found 0 images" in refusal(DataError, data_path=str(tmp_path))
    assert not caplog.records


def test_an_image_is_no_folder(tmp_path: Path) -> None:
    folder(tmp_path, ".", {"a": 1})
    message = refusal(DataError, data_path=str(tmp_path / "a" / "0.png"))
    assert message == f"data.data_path={tmp_path}/a/0.png is a file, not a folder or a .tar file of folders"


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


def test_a_tar_file_is_read_with_its_folders_as_classes(tmp_path: Path) -> None:
    members = {"cat/0.png": encoded(0), "cat/1.png": encoded(1), "dog/0.png": encoded(2)}
    images = source(data_path=str(write_tar(tmp_path / "set.tar", members)))
    assert images.class_names == ("cat", "dog")
    assert images.targets == [0, 0, 1]
    assert images.read(2)[1] == 1


def test_a_folder_without_class_folders_has_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    images = source(data_path=str(tmp_path))
    assert images.class_names is None
    assert images.targets == [UNLABELED] * 3
    assert images.read(0)[1] == UNLABELED


def test_images_beside_class_folders_are_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path, ["cat", "dog"])
    write_images(tmp_path / "train", 2)
    with caplog.at_level(logging.WARNING):
        images = source(data_path=str(tmp_path))
    assert images.class_names == ("cat", "dog")
    assert images.targets == [0, 0, 0, 1, 1, 1]
    assert images.read(5)[1] == 1
    assert "dog/102.png" in images.path(5)
    assert "2 images beside the class folders" in caplog.text


def test_class_folders_of_one_name_in_several_places_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for parent in ("red", "blue"):
        write_images(tmp_path / "train" / parent / "cat", 1)
    write_images(tmp_path / "train" / "red" / "dog", 1)
    with caplog.at_level(logging.WARNING):
        images = source(data_path=str(tmp_path))
    assert images.class_names == ("cat", "dog")
    assert "cat (blue/cat, red/cat)" in caplog.text
    assert "dog (" not in caplog.text


def test_some_classes_are_kept_of_a_larger_folder(tmp_path: Path) -> None:
    write_classes(tmp_path, ["ant", "bee", "cat", "class10", "class2"])
    images = source(data_path=str(tmp_path), classes="class10,bee,class2")
    assert images.class_names == ("bee", "class2", "class10")
    assert images.targets == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [Path(images.path(index)).parent.name for index in (0, 3, 6)] == ["bee", "class2", "class10"]
    assert images.read(8)[1] == 2
    names = tmp_path / "names.txt"
    names.write_text("# three\nclass10\n\nbee\nclass2\n")
    for classes in (str(names), ["bee", "class10", "class2"]):
        again = source("validation", data_path=str(tmp_path), classes=classes)
        assert (again.class_names, again.targets) == (images.class_names, images.targets)


def test_classes_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path, ["bee", "cat"])
    assert "data.classes names 'bea'" in refusal(DataError, data_path=str(tmp_path), classes="bea,cat")
    assert "missing.txt" in refusal(ConfigError, data_path=str(tmp_path), classes="missing.txt")
    assert "names no class" in refusal(ConfigError, data_path=str(tmp_path), classes=" ,")
    write_images(tmp_path / "flat", 1)
    assert "has none" in refusal(DataError, data_path=str(tmp_path / "flat"), classes="cat")


def test_a_split_of_another_name_is_hinted_at(tmp_path: Path) -> None:
    write_classes(tmp_path, ["bee"], ["train", "test"])
    message = refusal(DataError, "validation", data_path=str(tmp_path))
    assert "only train, test; data.val_split names another" in message


@pytest.mark.parametrize("name", ["torch/cifar10", "wds/shards"])
def test_a_set_without_its_folder_is_told_to_name_one(name: str) -> None:
    assert f"data.data_path is not set: {name} needs a folder" in refusal(DataError, dataset=name)
    with pytest.raises(DataError, match=r"data\.data_path is not set"):
        check_dataset(DataConfig(dataset=name))
