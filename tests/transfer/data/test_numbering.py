"""Labels by name: what a class is called decides its number, not which other folders lie beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.loaders import EvalLoader, create_eval_loader, create_train_loader
from PIL import Image

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def folder(root: Path, split: str, classes: dict[str, int], suffix: str = ".png") -> None:
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (9, 9)).save(root / split / name / f"{index}{suffix}")


def labels(root: Path, **keys: object) -> dict[str, int]:
    """The label of each class folder in the validation split."""
    source = open_dataset(DataConfig(data_path=str(root), **keys), "validation", 3, training=False)  # type: ignore[arg-type]
    found = {Path(source.path(index)).parent.name: source.read(index)[1] for index in range(len(source))}  # type: ignore[union-attr, arg-type]
    assert set(source.targets or ()) == set(found.values())  # type: ignore[union-attr]
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
    names = open_dataset(config, "train", 3, training=True).class_names  # type: ignore[union-attr]
    assert names is not None
    assert labels(tmp_path) == {name: names.index(name) for name, count in validation.items() if count}
    loader = create_train_loader(config, SPEC, seed=0)
    assert loader.num_classes == create_eval_loader(config, SPEC).num_classes == len(names)


def test_a_class_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 1, "b": 1})
    folder(tmp_path, "validation", {"a": 1, "d": 1})
    with pytest.raises(
        DataError, match=r"'validation' has classes that the training split has no images of: d"
    ):
        create_eval_loader(DataConfig(data_path=str(tmp_path)), SPEC)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, "train", {"a": 1, "b": 1})
    folder(tmp_path, "validation", {"a": 1, "b": 1})
    config = DataConfig(data_path=str(tmp_path), num_classes=1000, workers=0)
    for create in (
        lambda: create_train_loader(config, SPEC, seed=0),
        lambda: create_eval_loader(config, SPEC),
    ):
        with pytest.raises(
            ConfigError, match=r"num_classes=1000, but the data set has 2 named classes.*none"
        ):
            create()


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
