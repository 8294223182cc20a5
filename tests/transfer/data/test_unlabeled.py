"""Images without labels, and the labelled images that features are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import has_split, open_dataset
from graftvit.transfer.data.image_folder import UNLABELED, FolderImages
from graftvit.transfer.data.loaders import (
    create_eval_loader,
    create_reference_loader,
    create_train_loader,
    find_eval_loader,
)
from graftvit.transfer.data.survey import sample_images
from support.files.image_folders import class_folder, flat_folder, write_images

SPEC = Preprocessing((1, 8, 8), (0.5,), (0.5,))


def data(folder: Path, **keys: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"data_path": str(folder), "workers": 0, "batch_size": 4, "aa": None, **keys}
    )


def test_images_in_no_class_folder_have_no_label(tmp_path: Path) -> None:
    """timm takes them for one class, and a model of one class names them all right."""
    source = open_dataset(data(flat_folder(tmp_path, train=5)), "train", 1, training=True)
    assert isinstance(source, FolderImages)
    assert source.class_names is None
    assert source.targets == [UNLABELED] * 5
    assert source.read(3)[1] == UNLABELED


@pytest.mark.parametrize("keys", [{}, {"mixup": 0.8}, {"train_samples": 6}, {"num_classes": 1000}])
def test_a_run_without_labels_reads_them(keys: dict[str, Any], tmp_path: Path) -> None:
    config = data(flat_folder(tmp_path, train=9), **keys)
    loader = create_train_loader(config, SPEC, seed=0, labels=False)
    assert loader.num_classes == 0
    assert len(list(loader.epoch(0))) == keys.get("train_samples", 9) // 4
    assert sample_images(config, SPEC, 6).shape == (6, 1, 8, 8)
    with pytest.raises(DataError, match="has no class folders, and this needs labels"):
        create_train_loader(config, SPEC, seed=0)


def test_labels_count_where_there_are_some(tmp_path: Path) -> None:
    config = data(class_folder(tmp_path), num_classes=1)
    assert create_train_loader(config, SPEC, seed=0, labels=False).num_classes == 2
    assert create_eval_loader(config, SPEC, labels=False).num_classes == 2


def test_the_test_images_are_found_where_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat, split = flat_folder(tmp_path / "flat"), flat_folder(tmp_path / "split", validation=5)
    assert [has_split(data(folder), "validation") for folder in (flat, split)] == [False, True]
    found = find_eval_loader(data(split), SPEC)
    assert found is not None
    assert (found.num_samples, found.num_classes) == (5, 0)
    assert sum(int(valid.sum()) for *_, valid in found) == 5
    assert find_eval_loader(data(flat), SPEC) is None, "the training images are not test images"
    assert "nothing is evaluated" in caplog.text
    with pytest.raises(DataError, match=r"data\.val_split=holdout is no folder"):
        find_eval_loader(data(split, val_split="holdout"), SPEC)


def test_the_reference_is_the_training_split_as_evaluation_sees_it(tmp_path: Path) -> None:
    config = data(class_folder(tmp_path, train=8), hflip=1.0, crop_scale=(0.1, 0.2))
    reference, again = (create_reference_loader(config, SPEC) for _ in range(2))
    shown = torch.cat([images[valid] for images, _, valid in reference])
    assert len(shown) == 16
    assert torch.equal(shown, torch.cat([images[valid] for images, _, valid in again]))
    targets = torch.cat([targets[valid] for _, targets, valid in reference])
    assert targets.tolist() == [0] * 8 + [1] * 8
    few = create_reference_loader(data(tmp_path, train_samples=6), SPEC)
    assert torch.cat([targets[valid] for _, targets, valid in few]).bincount().tolist() == [3, 3]
    assert few.class_names == ("dark", "light")


def test_no_image_is_its_own_neighbor(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 3)
    with pytest.raises(DataError, match="apart from the test images"):
        create_reference_loader(data(tmp_path), SPEC)
    with pytest.raises(DataError, match="apart from the test images"):
        create_reference_loader(DataConfig(dataset="digits", val_split="train"), SPEC)
