"""Data sets of Hugging Face, read with the real package from local files: columns, splits, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError, GraftError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.image_folder import UNLABELED, ImageSource
from graftvit.transfer.data.loaders import create_eval_loader, create_train_loader
from support.files.data_sets import write_parquet

datasets = pytest.importorskip("datasets")

ANIMALS = ["cat", "dog", "eel"]
SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # else it tries again for half a minute
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def config(root: Path, **keys: Any) -> DataConfig:
    return DataConfig(
        **{"dataset": f"hfds/{root}", "data_path": str(root.parent / "cache"), "workers": 0} | keys
    )


def opened(root: Path, split: str = "train", channels: int = 3, **keys: Any) -> ImageSource:
    found = open_dataset(config(root, **keys), split, channels, training=False)
    assert not hasattr(found, "__iter__")
    return found  # type: ignore[return-value]


def refusal(root: Path, split: str = "train", **keys: Any) -> str:
    with pytest.raises(GraftError) as caught:
        opened(root, split, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def animals(*values: int) -> Any:
    return datasets.ClassLabel(names=ANIMALS), values or (0, 1, 2, 0, 1, 2)


@pytest.mark.parametrize(
    ("image", "label"),
    [("image", "label"), ("img", "labels"), ("photograph", "fine_label"), ("image", "species")],
)
def test_columns_are_guessed(tmp_path: Path, image: str, label: str) -> None:
    found = opened(write_parquet(tmp_path / "set", {label: animals()}, image_column=image))
    assert len(found) == 6
    assert found.class_names == tuple(ANIMALS)
    assert found.targets == [0, 1, 2, 0, 1, 2]
    picture, target = found.read(4)
    assert (picture.mode, picture.size, target) == ("RGB", (10, 10), 1)
    assert "train4.png" in found.path(4)


def test_columns_are_settings(tmp_path: Path) -> None:
    columns = {"fine_label": animals(), "coarse_label": (datasets.Value("int64"), [7, 7, 8, 7, 7, 8])}
    root = write_parquet(tmp_path / "set", columns)
    assert opened(root).targets == [0, 1, 2, 0, 1, 2]
    assert opened(root, label_column="coarse_label").targets == [7, 7, 8, 7, 7, 8]
    for key in ("image_column", "label_column"):
        message = refusal(root, **{key: "colour"})
        assert f"data.{key}=colour" in message
        assert "coarse_label, fine_label, image" in message


def test_what_holds_no_image_or_no_label_is_named(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set", {"boxes": (datasets.List(datasets.Value("int64")), [[1, 2]] * 6)})
    assert "data.label_column=boxes" in refusal(root, label_column="boxes")
    found = opened(root)
    assert found.class_names is None
    assert found.targets == [UNLABELED] * 6
    assert found.read(0)[1] == UNLABELED


def test_names_as_labels_are_numbered_as_in_training(tmp_path: Path) -> None:
    import shutil

    root = write_parquet(tmp_path / "set", {"label": (datasets.Value("string"), ANIMALS * 2)})
    other = write_parquet(tmp_path / "other", {"label": (datasets.Value("string"), ["eel"] * 6)})
    shutil.copy(next(other.glob("validation*")), root)
    assert opened(root).targets == [0, 1, 2, 0, 1, 2]
    assert opened(root, "validation").targets == [2] * 6
    assert opened(root, "validation").class_names == tuple(ANIMALS)


def test_a_label_that_is_missing_is_none(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set", {"label": (datasets.Value("int64"), [0, 1, None, -1, 1, 0])})
    assert opened(root).targets == [0, 1, UNLABELED, UNLABELED, 1, 0]


def test_splits_have_synonyms_and_the_others_are_named(tmp_path: Path) -> None:
    root = write_parquet(
        tmp_path / "set", {"label": animals()}, {"train": "train", "val": "valid", "test": "test"}
    )
    assert len(opened(root, "validation")) == 6
    assert len(opened(root, "train[:50%]")) == 3
    message = refusal(root, "extra")
    assert "'extra'" in message
    assert "test, train" in message


def test_a_set_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set", {"label": animals()})
    loaded = datasets.load_dataset(str(root), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "both"))
    loaded["train"].save_to_disk(str(tmp_path / "one"))
    assert opened(tmp_path / "both", "validation").targets == [0, 1, 2, 0, 1, 2]
    assert len(opened(tmp_path / "one")) == 6
    assert "no split 'validation'" in refusal(tmp_path / "one", "validation")


def test_a_set_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert "hfds/nobody/nothing" in refusal(Path("nobody/nothing"))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_it(tmp_path: Path, workers: int) -> None:
    root = write_parquet(tmp_path / "set", {"fine_label": animals()}, image_column="img")
    settings = config(root, workers=workers, batch_size=3)
    train = create_train_loader(settings, SPEC, seed=0)
    assert sorted(int(each) for _, targets in train.epoch(0) for each in targets) == [0, 0, 1, 1, 2, 2]
    assert sum(int(valid.sum()) for _, _, valid in create_eval_loader(settings, SPEC)) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_have_the_same_columns(tmp_path: Path, workers: int) -> None:
    root = write_parquet(tmp_path / "set", {"fine_label": animals()}, image_column="img")
    settings = config(root, dataset=f"hfids/{root}", batch_size=3, workers=workers, download=True)
    train = create_train_loader(settings, SPEC, seed=0)
    assert (train.num_classes, train.batches_per_epoch) == (3, 2)
    assert {int(each) for _, targets in train.epoch(0) for each in targets} <= {0, 1, 2}
    with pytest.raises(DataError, match=r"data\.label_column=kind.*fine_label, img"):
        create_train_loader(settings.model_copy(update={"label_column": "kind"}), SPEC, seed=0)
    with pytest.raises(DataError, match="--download"):
        create_train_loader(
            settings.model_copy(update={"download": False, "data_path": str(tmp_path / "fresh")}),
            SPEC,
            seed=0,
        )
