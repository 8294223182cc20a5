"""Links in a folder of images: each real file counts once, and an image of both splits is noticed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.image_folder import IMAGE_TYPES, ImageSource
from graftvit.transfer.data.loaders import create_eval_loader, create_reference_loader
from support.files.data_sets import write_classes, write_images
from timm.data.readers.reader_image_folder import find_images_and_targets

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def source(root: Path, split: str = "train") -> ImageSource:
    opened = open_dataset(DataConfig(data_path=str(root)), split, 3, training=True)
    assert not hasattr(opened, "__iter__")
    return opened  # type: ignore[return-value]


def names(images: ImageSource, root: Path) -> list[str]:
    return [str(Path(images.path(index)).relative_to(root)) for index in range(len(images))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "set", ["cat", "dog"], count=2)


def test_an_ordinary_folder_is_read_in_the_order_that_timm_has(root: Path) -> None:
    write_images(root / "train" / "deep" / "class10", 2)
    write_images(root / "train" / "deep" / "class9", 2, suffix="JPG")
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    found = source(root)
    samples, numbers = find_images_and_targets(str(root / "train"), IMAGE_TYPES)
    assert [(found.path(index), found.read(index)[1]) for index in range(len(found))] == samples
    assert found.class_names == tuple(numbers) == ("cat", "class9", "class10", "dog")


@pytest.mark.parametrize("place", ["train/loop", "train/cat/loop", "train/cat/more/loop"])
@pytest.mark.parametrize("target", ["train", "train/cat"])
def test_a_link_in_a_circle_counts_no_image_twice(
    root: Path, place: str, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It counted each forty times, and two circles in one folder took as long as there is time."""
    before = names(source(root), root)
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(root / target)
    (root / place).with_name("again").symlink_to(root / target)
    found = source(root)
    assert names(found, root) == before
    assert found.class_names == ("cat", "dog")
    assert found.targets == [0, 0, 1, 1]
    assert "are left out" in caplog.text
    assert str(root / place) in caplog.text


def test_a_file_that_several_links_lead_to_counts_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    (dog / "a_cat.png").symlink_to(cat / "000.png")
    (cat / "a.png").symlink_to(dog / "100.png")
    (root / "train" / "hound").symlink_to(dog)
    assert names(source(root), root) == [
        "train/cat/000.png", "train/cat/001.png", "train/dog/100.png", "train/dog/101.png",
    ]  # fmt: skip
    assert "3 links lead to images that are there already and are left out" in caplog.text


def test_links_to_other_places_are_followed(root: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "store" / "ant", 2)
    write_images(tmp_path / "store" / "one", 1)
    (root / "train" / "ant").symlink_to(tmp_path / "store" / "ant")
    (root / "train" / "cat" / "other.png").symlink_to(tmp_path / "store" / "one" / "000.png")
    found = source(root)
    assert found.class_names == ("ant", "cat", "dog")
    assert found.targets == [0, 0, 1, 1, 1, 2, 2]


def test_a_validation_split_that_is_the_training_split_is_told(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in sorted((root / "val").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / "val").rmdir()
    (root / "val").symlink_to("train")
    config = DataConfig(data_path=str(root), workers=0, batch_size=4)
    create_eval_loader(config, SPEC)
    assert "4 images of split 'validation' are images of split 'train'" in caplog.text
    with pytest.raises(DataError, match="4 images of split 'validation' are images of split 'train'"):
        create_reference_loader(config, SPEC)


def test_some_validation_images_that_are_training_images_are_told(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "val" / "cat" / "seen.png").symlink_to(root / "train" / "cat" / "000.png")
    config = DataConfig(data_path=str(root), workers=0, batch_size=4)
    create_eval_loader(config, SPEC)
    assert "1 image of split 'validation' is an image of split 'train'" in caplog.text
    with pytest.raises(DataError, match="1 image of split 'validation'"):
        create_reference_loader(config, SPEC)
    (root / "val" / "cat" / "seen.png").unlink()
    create_reference_loader(config, SPEC)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_may_not_be_read_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "dog").chmod(0)
    with caplog.at_level(logging.WARNING):
        assert source(root).class_names == ("cat",)
    assert f"{root}/train/dog cannot be read" in caplog.text
    (root / "train" / "dog").chmod(0o755)
