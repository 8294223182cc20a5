"""Opening data sets: which files are read, in which order, with which labels, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError, GraftError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import check_dataset, has_split, open_dataset
from graftvit.transfer.data.digits import DigitsSource, _read_split
from graftvit.transfer.data.image_folder import IMAGE_TYPES, UNLABELED, ImageSource
from graftvit.transfer.data.labels import real_labels, subset_classes
from graftvit.transfer.data.loaders import (
    EvalLoader,
    create_eval_loader,
    create_reference_loader,
    create_train_loader,
    find_eval_loader,
)
from graftvit.transfer.data.survey import sample_images
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from support.files.data_sets import encoded, write_classes, write_fashion, write_images, write_tar
from support.files.image_folders import class_folder, flat_folder
from timm.data.readers.reader_image_folder import find_images_and_targets

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def folder(root: Path, split: str, classes: dict[str, int], suffix: str = ".png") -> None:
    random = np.random.RandomState(0)
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.randint(0, 256, (9, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{number}{suffix}")


def source(split: str = "train", channels: int = 3, **keys: Any) -> ImageSource:
    opened = open_dataset(DataConfig(**keys), split, channels, training=True)
    assert not hasattr(opened, "__iter__")
    return opened  # type: ignore[return-value]


def refusal(kind: type[GraftError], split: str = "train", channels: int = 3, **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        source(split, channels, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_torchvision_and_tar_files_have_the_same_classes(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 2, "b": 1})
    members = {"a/0.png": encoded(0), "a/1.png": encoded(1), "b/0.png": encoded(2)}
    tar = source(data_path=str(write_tar(tmp_path / "set.tar", members)))
    assert tar.class_names == ("a", "b")
    for images in (source(dataset="torch/image_folder", data_path=str(tmp_path)), tar):
        assert (len(images), images.targets, images.read(2)[1]) == (3, [0, 0, 1], 1)
        assert images.path(2).endswith("b/0.png")


def test_a_split_that_lacks_a_class_keeps_the_training_labels(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"class2": 1, "class10": 1, "zebra": 1})
    folder(tmp_path, "val", {"class10": 1, "zebra": 2})
    images = source(data_path=str(tmp_path))
    by_name = {Path(images.path(i)).parent.name: images.read(i)[1] for i in range(3)}
    assert by_name == {"class2": 0, "class10": 1, "zebra": 2}
    assert source("validation", data_path=str(tmp_path)).targets == [1, 2, 2]


def test_synonyms_of_a_split_are_found_and_the_training_images_are_never_evaluated(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 1})
    message = refusal(DataError, "validation", data_path=str(tmp_path))
    assert "no folder for split 'validation', only train" in message
    folder(tmp_path, "test", {"a": 4})
    message = refusal(DataError, "validation", data_path=str(tmp_path))
    assert "only train, test; data.val_split names another" in message
    folder(tmp_path, "val", {"a": 4})
    assert len(source("validation", data_path=str(tmp_path))) == 4


def test_a_folder_without_splits_is_read_whole_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder(tmp_path, ".", {"a": 1, "b": 1})
    check_dataset(DataConfig(data_path=str(tmp_path)))
    assert len(source(data_path=str(tmp_path))) == 2
    assert caplog.text.count("all of it is used") == 1


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "data.data_path=/nowhere does not exist" in refusal(DataError, data_path="/nowhere")
    assert "Found 0 images" in refusal(DataError, data_path=str(tmp_path))
    assert not caplog.records
    cifar = refusal(DataError, dataset="torch/cifar10", data_path=str(tmp_path))
    assert "torch/cifar10" in cifar
    assert "download" in cifar
    assert "data.data_path is not set" in refusal(DataError)
    for name in ("torch/cifar10", "wds/shards"):
        assert f"data.data_path is not set: {name} needs a folder" in refusal(DataError, dataset=name)
        with pytest.raises(DataError, match=r"data\.data_path is not set"):
            check_dataset(DataConfig(dataset=name))
    folder(tmp_path, ".", {"a": 1})
    image = tmp_path / "a" / "0.png"
    assert f"data.data_path={image} is a file, not a folder" in refusal(DataError, data_path=str(image))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'datasets>=" in refusal(DataError, dataset="hfds/mnist")


def test_a_damaged_file_of_a_torchvision_set_is_named(tmp_path: Path) -> None:
    raw = write_fashion(tmp_path / "FashionMNIST" / "raw")
    fashion = {"dataset": "torch/fashion_mnist", "data_path": str(tmp_path)}
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    for file, content in ((images, images.read_bytes()), (labels, labels.read_bytes())):
        for damaged in (
            b"",
            content[:-1],
            b"<!DOCTYPE html>" * 40,
            content[:4] + b"\xff" * 12 + content[16:],
        ):
            file.write_bytes(damaged)
            assert f"{file} is missing or damaged: remove it" in refusal(DataError, "validation", **fashion)
        file.unlink()
        assert f"{file} is missing or damaged" in refusal(DataError, "train", **fashion)
        file.write_bytes(content)
    labels.write_bytes((raw / "train-labels-idx1-ubyte").read_bytes())
    assert "20 images and 60 labels" in refusal(DataError, "validation", **fashion)
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_2").write_bytes(b"cut")
    cifar = refusal(DataError, dataset="torch/cifar10", data_path=str(tmp_path))
    assert f"{batches / 'data_batch_1'} is missing or damaged" in cifar


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("digit", ConfigError, "did you mean 'digits'"),
        ("cifar10", ConfigError, "valid:"),
        ("tourch/cifar10", ConfigError, "'tourch/cifar10'"),
        ("torch/cifar11", DataError, "torch/cifar11"),
    ],
)
def test_an_unknown_name_is_not_read_as_a_folder(
    tmp_path: Path, name: str, kind: type[GraftError], hint: str
) -> None:
    folder(tmp_path, "train", {"a": 1})
    assert hint in refusal(kind, dataset=name, data_path=str(tmp_path))


def test_other_channels_splits_and_subsets_are_refused() -> None:
    assert "4 channels" in refusal(DataError, channels=4, dataset="digits")
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        DigitsSource("trian", "L")
    with pytest.raises(ConfigError, match="'imagenet-b'; did you mean 'imagenet-"):
        subset_classes("imagenet-b")


def test_a_folder_without_class_folders_has_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    images = source(data_path=str(tmp_path))
    assert images.class_names is None
    assert images.targets == [UNLABELED] * 3
    assert images.read(0)[1] == UNLABELED


def test_images_beside_class_folders_are_no_class_and_one_name_in_two_places_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_classes(tmp_path, ["cat", "dog"])
    write_images(tmp_path / "train", 2)
    images = source(data_path=str(tmp_path))
    assert images.class_names == ("cat", "dog")
    assert images.targets == [0, 0, 0, 1, 1, 1]
    assert images.read(5)[1] == 1
    assert "dog/102.png" in images.path(5)
    assert "2 images beside the class folders" in caplog.text
    write_images(tmp_path / "train" / "blue" / "cat", 1)
    assert source(data_path=str(tmp_path)).class_names == ("cat", "dog")
    assert "cat (blue/cat, cat)" in caplog.text
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


def labels(root: Path, **keys: Any) -> dict[str, int]:
    """The label of each class folder in the validation split."""
    images = source("validation", data_path=str(root), **keys)
    found = {Path(images.path(index)).parent.name: images.read(index)[1] for index in range(len(images))}
    assert set(images.targets or ()) == set(found.values())
    return found


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ({"a": 1, "b": 1, "c": 1}, {"b": 1, "c": 1}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 0, "c": 1}),  # the folder is there, its images are not
        ({"a": 1, "b": 1, "c": 1, ".ipynb_checkpoints": 0}, {"a": 1, "c": 1}),
        ({"a": 1, "b": 0, "c": 1}, {"c": 2}),
        ({"a10": 1, "a9": 1}, {"a10": 1}),
    ],
)
def test_a_class_has_the_number_that_it_has_in_training(
    tmp_path: Path, train: dict[str, int], validation: dict[str, int]
) -> None:
    folder(tmp_path, "train", train)
    folder(tmp_path, "validation", validation)
    config = DataConfig(data_path=str(tmp_path), workers=0, batch_size=2)
    names = source(data_path=str(tmp_path)).class_names
    assert names is not None
    assert labels(tmp_path) == {name: names.index(name) for name, count in validation.items() if count}
    loader = create_train_loader(config, SPEC, seed=0)
    assert loader.num_classes == create_eval_loader(config, SPEC).num_classes == len(names)


def test_a_class_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 1, "b": 1})
    folder(tmp_path, "validation", {"a": 1, "d": 1})
    with pytest.raises(DataError, match=r"'validation' has classes that the training split has no .*: d"):
        create_eval_loader(DataConfig(data_path=str(tmp_path)), SPEC)


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tif", ".JPEG", ".ppm"])
def test_images_of_other_types_are_read(tmp_path: Path, suffix: str) -> None:
    folder(tmp_path, "train", {"a": 2, "b": 1}, suffix)
    folder(tmp_path, "train", {"b": 1})
    config = DataConfig(data_path=str(tmp_path), workers=0, batch_size=4, aa=None)
    loader = create_train_loader(config, SPEC, seed=0)
    (batch,) = loader.epoch(0)
    assert sorted(batch[1].tolist()) == [0, 0, 1, 1]
    assert loader.bad_images == []


def test_evaluation_needs_a_split(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 2})
    with pytest.raises(ConfigError, match=r"data\.val_split=none"):
        create_eval_loader(DataConfig(data_path=str(tmp_path), val_split=None), SPEC)
    with pytest.raises(DataError, match="none to train without evaluation"):
        create_eval_loader(DataConfig(data_path=str(tmp_path)), SPEC)


def test_some_images_without_a_label_are_refused() -> None:
    class Source:
        targets = (0, -1, 1)
        class_names = ("a", "b")

        def __len__(self) -> int:
            return 3

    with pytest.raises(DataError, match="1 of 3 images have no label"):
        EvalLoader(Source(), DataConfig(workers=0), SPEC, rank=0, world_size=1)  # type: ignore[arg-type]


def names_of(images: ImageSource, root: Path) -> list[str]:
    return [str(Path(images.path(index)).relative_to(root)) for index in range(len(images))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "set", ["cat", "dog"], count=2)


def test_an_ordinary_folder_is_read_in_the_order_that_timm_has(root: Path) -> None:
    write_images(root / "train" / "deep" / "class10", 2)
    write_images(root / "train" / "deep" / "class9", 2, suffix="JPG")
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    found = source(data_path=str(root))
    samples, numbers = find_images_and_targets(str(root / "train"), IMAGE_TYPES)
    assert [(found.path(index), found.read(index)[1]) for index in range(len(found))] == samples
    assert found.class_names == tuple(numbers) == ("cat", "class9", "class10", "dog")


@pytest.mark.parametrize("place", ["train/loop", "train/cat/loop", "train/cat/more/loop"])
@pytest.mark.parametrize("target", ["train", "train/cat"])
def test_a_link_in_a_circle_counts_no_image_twice(
    root: Path, place: str, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It counted each forty times, and two circles in one folder took as long as there is time."""
    before = names_of(source(data_path=str(root)), root)
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(root / target)
    (root / place).with_name("again").symlink_to(root / target)
    found = source(data_path=str(root))
    assert names_of(found, root) == before
    assert found.class_names == ("cat", "dog")
    assert found.targets == [0, 0, 1, 1]
    assert "are left out" in caplog.text
    assert str(root / place) in caplog.text


def test_a_file_that_several_links_lead_to_counts_once_and_links_elsewhere_are_followed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    (dog / "a_cat.png").symlink_to(cat / "000.png")
    (cat / "a.png").symlink_to(dog / "100.png")
    (root / "train" / "hound").symlink_to(dog)
    assert names_of(source(data_path=str(root)), root) == [
        "train/cat/000.png", "train/cat/001.png", "train/dog/100.png", "train/dog/101.png",
    ]  # fmt: skip
    assert "3 links lead to images that are there already and are left out" in caplog.text
    for name, count in (("ant", 2), ("one", 1)):
        write_images(tmp_path / "store" / name, count)
    (root / "train" / "ant").symlink_to(tmp_path / "store" / "ant")
    (cat / "other.png").symlink_to(tmp_path / "store" / "one" / "000.png")
    found = source(data_path=str(root))
    assert found.class_names == ("ant", "cat", "dog")
    assert found.targets == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("whole", [True, False])
def test_validation_images_that_are_training_images_are_told(
    whole: bool, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(data_path=str(root), workers=0, batch_size=4)
    if whole:
        shutil.rmtree(root / "val")
        (root / "val").symlink_to("train")
    else:
        create_reference_loader(config, SPEC)
        (root / "val" / "cat" / "seen.png").symlink_to(root / "train" / "cat" / "000.png")
    message = (
        "4 images of split 'validation' are images" if whole else "1 image of split 'validation' is an image"
    )
    create_eval_loader(config, SPEC)
    assert f"{message} of split 'train'" in caplog.text
    with pytest.raises(DataError, match=message):
        create_reference_loader(config, SPEC)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_may_not_be_read_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "dog").chmod(0)
    with caplog.at_level(logging.WARNING):
        assert source(data_path=str(root)).class_names == ("cat",)
    assert f"{root}/train/dog cannot be read" in caplog.text
    (root / "train" / "dog").chmod(0o755)


GRAY = Preprocessing((1, 8, 8), (0.5,), (0.5,))


def unlabeled(folder: Path, **keys: Any) -> DataConfig:
    return DataConfig(**{"data_path": str(folder), "workers": 0, "batch_size": 4, "aa": None, **keys})


@pytest.mark.parametrize("keys", [{}, {"mixup": 0.8}, {"train_samples": 6}, {"num_classes": 1000}])
def test_a_run_without_labels_reads_them(keys: dict[str, Any], tmp_path: Path) -> None:
    config = unlabeled(flat_folder(tmp_path, train=9), **keys)
    loader = create_train_loader(config, GRAY, seed=0, labels=False)
    assert loader.num_classes == 0
    assert len(list(loader.epoch(0))) == keys.get("train_samples", 9) // 4
    assert sample_images(config, GRAY, 6).shape == (6, 1, 8, 8)
    with pytest.raises(DataError, match="has no class folders, and this needs labels"):
        create_train_loader(config, GRAY, seed=0)


def test_labels_count_where_there_are_some(tmp_path: Path) -> None:
    config = unlabeled(class_folder(tmp_path), num_classes=1)
    assert create_train_loader(config, GRAY, seed=0, labels=False).num_classes == 2
    assert create_eval_loader(config, GRAY, labels=False).num_classes == 2


def test_the_test_images_are_found_where_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat, split = flat_folder(tmp_path / "flat"), flat_folder(tmp_path / "split", validation=5)
    assert [has_split(unlabeled(folder), "validation") for folder in (flat, split)] == [False, True]
    found = find_eval_loader(unlabeled(split), GRAY)
    assert found is not None
    assert (found.num_samples, found.num_classes) == (5, 0)
    assert sum(int(valid.sum()) for *_, valid in found) == 5
    assert find_eval_loader(unlabeled(flat), GRAY) is None, "the training images are not test images"
    assert "nothing is evaluated" in caplog.text
    with pytest.raises(DataError, match=r"data\.val_split=holdout is no folder"):
        find_eval_loader(unlabeled(split, val_split="holdout"), GRAY)


def test_the_reference_is_the_training_split_as_evaluation_sees_it(tmp_path: Path) -> None:
    config = unlabeled(class_folder(tmp_path, train=8), hflip=1.0, crop_scale=(0.1, 0.2))
    reference, again = (create_reference_loader(config, GRAY) for _ in range(2))
    shown = torch.cat([images[valid] for images, _, valid in reference])
    assert len(shown) == 16
    assert torch.equal(shown, torch.cat([images[valid] for images, _, valid in again]))
    targets = torch.cat([targets[valid] for _, targets, valid in reference])
    assert targets.tolist() == [0] * 8 + [1] * 8
    few = create_reference_loader(unlabeled(tmp_path, train_samples=6), GRAY)
    assert torch.cat([targets[valid] for _, targets, valid in few]).bincount().tolist() == [3, 3]
    assert few.class_names == ("dark", "light")


def test_no_image_is_its_own_neighbor(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 3)
    with pytest.raises(DataError, match="apart from the test images"):
        create_reference_loader(unlabeled(tmp_path), GRAY)
    with pytest.raises(DataError, match="apart from the test images"):
        create_reference_loader(DataConfig(dataset="digits", val_split="train"), GRAY)


def test_the_split_is_fixed_stratified_and_whole() -> None:
    train, validation = DigitsSource("train", "L"), DigitsSource("validation", "L")
    assert (len(train), len(validation)) == (1297, 500)
    paths = {source.path(index) for source in (train, validation) for index in range(len(source))}
    assert len(paths) == 1797
    counts = Counter(validation.targets)
    assert max(counts.values()) - min(counts.values()) <= 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_images_are_those_of_scikit_learns_own_functions(split: str) -> None:
    digits = load_digits()
    drawn = train_test_split(np.arange(1797), test_size=500, stratify=digits.target, random_state=0)
    expected = np.sort(drawn[split == "validation"])
    places, pixels, targets = _read_split(split)
    assert (places.dtype, pixels.dtype, targets.dtype) == (np.int64, np.uint8, np.int64)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(targets, digits.target[expected])
    np.testing.assert_array_equal(pixels, np.rint(digits.images[expected] * (255 / 16)).astype(np.uint8))


def test_pixels_and_labels_are_scikit_learns_in_the_color_mode_of_the_model() -> None:
    source, digits = DigitsSource("val", "L"), load_digits()
    for index in (0, 17, 499):
        place = int(source.path(index)[len("digits[") : -1])
        image, target = source.read(index)
        assert (target, image.size, image.mode) == (digits.target[place], (8, 8), "L")
        np.testing.assert_allclose(np.asarray(image) * (16 / 255), digits.images[place], atol=0.04)
    assert DigitsSource("train", "RGB").read(0)[0].mode == "RGB"


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_classes_of_a_subset_are_in_the_order_of_its_folders(name: str) -> None:
    info = files("timm.data") / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    own = (info / f"{name.replace('-', '_')}_synsets.txt").read_text().split()
    classes = subset_classes(name)
    assert len(classes) == 200
    assert [synsets[index] for index in classes] == sorted(own)


def test_real_labels_go_by_file_name(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[3, 7], [], [999]]))
    names = [f"/data/val/n01/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)]
    labels = real_labels(names, file)
    assert [row.nonzero().flatten().tolist() for row in labels] == [[999], [3, 7], []]


def test_timms_copy_is_the_default() -> None:
    labels = real_labels([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50001, 997)])
    shipped = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    assert [row.nonzero().flatten().tolist() for row in labels] == [sorted(each) for each in shipped[::997]]


@pytest.mark.parametrize("name", ["cat.jpg", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG"])
def test_other_images_have_no_real_label(name: str) -> None:
    with pytest.raises(DataError, match="has no ReaL label"):
        real_labels([name])


@pytest.mark.parametrize(
    "text",
    [None, "no JSON", "[" * 100_000, "{}", "[[1000]]", "[[-1]]", '["a"]', "[[1], 5]"],
    ids=lambda x: str(x)[:9],
)
def test_a_file_that_has_no_labels_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=r"real\.json"):
        real_labels(["ILSVRC2012_val_00000001.JPEG"], tmp_path / "real.json")
