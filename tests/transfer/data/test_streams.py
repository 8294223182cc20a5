"""Streams, WebDataset shards and sets of Hugging Face, read with the real packages from local files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError, GraftError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders as data
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.image_folder import UNLABELED, ImageSource
from graftvit.transfer.data.loaders import create_eval_loader, create_train_loader
from PIL import Image
from support.files.data_sets import encoded, write_parquet, write_shards, write_tar
from torch.utils.data import IterableDataset

SPEC = Preprocessing((1, 4, 4), (0.0,), (1.0,))


class Stream(IterableDataset[Any]):
    """Gray images whose brightness is their number, in an order of the epoch's, as timm's streams have it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for place in range(self.size):
            number = (place * 7 + self.epoch) % self.size
            yield Image.new("L", (4, 4), number), number % 3


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "open_dataset", lambda *_, **__: Stream(23))


CONFIG = DataConfig(dataset="wds/x", num_classes=3, batch_size=4, workers=0, aa="affine", mixup=0.8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.usefixtures("streamed")
def test_a_resumed_epoch_is_fast_forwarded(start: int, workers: int) -> None:
    config = CONFIG.model_copy(update={"workers": workers})
    loader = create_train_loader(config, SPEC, seed=0)
    assert (loader.batches_per_epoch, loader.num_classes) == (5, 3)
    whole = list(create_train_loader(CONFIG, SPEC, seed=0).epoch(3))
    list(loader.epoch(2))
    resumed = list(loader.epoch(3, start))
    assert len(whole) == 5
    assert len(resumed) == 5 - start
    for (images, targets), (again, same) in zip(whole[start:], resumed, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(targets, same)


@pytest.mark.usefixtures("streamed")
def test_a_stream_gives_as_many_batches_as_the_run_began_with() -> None:
    loader = create_train_loader(CONFIG, SPEC, seed=0)
    loader.batches_per_epoch = 7
    assert [len(images) for images, _ in loader.epoch(1)] == [4] * 7


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.usefixtures("streamed")
def test_evaluation_counts_each_image_once(world: int) -> None:
    seen: list[int] = []
    batches = set()
    for rank in range(world):
        made = list(create_eval_loader(CONFIG, SPEC, rank=rank, world_size=world))
        batches.add(len(made))
        seen += [round(float(image.max() * 255)) for images, _, valid in made for image in images[valid]]
    assert len(batches) == 1
    assert sorted(seen) == list(range(23))


@pytest.mark.usefixtures("streamed")
def test_what_needs_an_index_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_samples=4 needs samples by index"):
        create_train_loader(CONFIG.model_copy(update={"train_samples": 4}), SPEC, seed=0)
    with pytest.raises(ConfigError, match="val_samples=4 needs samples by index"):
        create_eval_loader(CONFIG.model_copy(update={"val_samples": 4}), SPEC)
    with pytest.raises(ConfigError, match="another number of ranks"):
        create_train_loader(CONFIG, SPEC, seed=0).epoch_from(0, 4)
    with pytest.raises(ConfigError, match=r"data\.num_classes must be set"):
        create_train_loader(CONFIG.model_copy(update={"num_classes": None}), SPEC, seed=0)


RGB = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def shard_config(root: Path, **keys: Any) -> DataConfig:
    common = {
        "dataset": "wds/shards",
        "data_path": str(root),
        "num_classes": 2,
        "batch_size": 2,
        "workers": 0,
    }
    return DataConfig(**common | keys)


def labels(loader: Any) -> list[int]:
    return sorted(int(target) for _, targets, valid in loader for target in targets[valid])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png"])
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_are_trained_on_and_evaluated(tmp_path: Path, suffix: str, workers: int) -> None:
    settings = shard_config(write_shards(tmp_path, suffix=suffix), workers=workers)
    train = create_train_loader(settings, RGB, seed=0)
    assert (train.num_samples, train.batches_per_epoch) == (8, 4)
    assert len(list(train.epoch(0))) == 4
    assert labels(create_eval_loader(settings, RGB)) == [0] * 4 + [1] * 4


def test_the_label_may_be_a_field_and_the_shards_a_pattern(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "_info.json").unlink()
    shards = "validation-{0000..0001}.tar|8"
    settings = shard_config(tmp_path, val_split=shards, label_column="kind", image_column="jpg")
    assert labels(create_eval_loader(settings, RGB)) == [0] * 4 + [1] * 4


def test_what_is_missing_is_one_sentence(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(DataError, match=r"colour.*kind"):
        labels(create_eval_loader(shard_config(tmp_path, label_column="colour"), RGB))
    (tmp_path / "_info.json").unlink()
    with pytest.raises(DataError, match=r"data\.train_split=") as caught:
        create_train_loader(shard_config(tmp_path), RGB, seed=0)
    assert '_info.json such as {"splits": {"train": {"filenames": ["shards-0000.tar",' in str(caught.value)


def test_samples_without_a_label_do_not_vanish(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0000.tar", {"0.jpg": encoded(0, "JPEG"), "1.jpg": encoded(1, "JPEG")})
    settings = shard_config(tmp_path, val_split="a-{0000..0000}.tar|2")
    with pytest.raises(DataError, match=r"a-0000\.tar: 0: has no label"):
        labels(create_eval_loader(settings, RGB))


datasets = pytest.importorskip("datasets")

ANIMALS = ["cat", "dog", "eel"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # or it tries again for half a minute
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def config(root: Path, **keys: Any) -> DataConfig:
    common = {"dataset": f"hfds/{root}", "data_path": str(root.parent / "cache"), "workers": 0}
    return DataConfig(**common | keys)


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


def test_names_as_labels_are_numbered_as_in_training_and_a_missing_one_is_none(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set", {"label": (datasets.Value("string"), ANIMALS * 2)})
    other = write_parquet(tmp_path / "other", {"label": (datasets.Value("string"), ["eel"] * 6)})
    shutil.copy(next(other.glob("validation*")), root)
    assert opened(root).targets == [0, 1, 2, 0, 1, 2]
    assert opened(root, "validation").targets == [2] * 6
    assert opened(root, "validation").class_names == tuple(ANIMALS)
    root = write_parquet(tmp_path / "numbers", {"label": (datasets.Value("int64"), [0, 1, None, -1, 1, 0])})
    assert opened(root).targets == [0, 1, UNLABELED, UNLABELED, 1, 0]


def test_splits_have_synonyms_and_the_others_are_named(tmp_path: Path) -> None:
    splits = {"train": "train", "val": "valid", "test": "test"}
    root = write_parquet(tmp_path / "set", {"label": animals()}, splits)
    assert len(opened(root, "validation")) == 6
    assert len(opened(root, "train[:50%]")) == 3
    message = refusal(root, "extra")
    assert "'extra'" in message
    assert "test, train" in message
    assert "hfds/nobody/nothing" in refusal(Path("nobody/nothing"))


def test_a_set_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    root = write_parquet(tmp_path / "set", {"label": animals()})
    loaded = datasets.load_dataset(str(root), cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "both"))
    loaded["train"].save_to_disk(str(tmp_path / "one"))
    assert opened(tmp_path / "both", "validation").targets == [0, 1, 2, 0, 1, 2]
    assert len(opened(tmp_path / "one")) == 6
    assert "no split 'validation'" in refusal(tmp_path / "one", "validation")


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_it(tmp_path: Path, workers: int) -> None:
    root = write_parquet(tmp_path / "set", {"fine_label": animals()}, image_column="img")
    settings = config(root, workers=workers, batch_size=3)
    train = create_train_loader(settings, RGB, seed=0)
    assert sorted(int(each) for _, targets in train.epoch(0) for each in targets) == [0, 0, 1, 1, 2, 2]
    assert sum(int(valid.sum()) for _, _, valid in create_eval_loader(settings, RGB)) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_streams_have_the_same_columns(tmp_path: Path, workers: int) -> None:
    root = write_parquet(tmp_path / "set", {"fine_label": animals()}, image_column="img")
    settings = config(root, dataset=f"hfids/{root}", batch_size=3, workers=workers, download=True)
    train = create_train_loader(settings, RGB, seed=0)
    assert (train.num_classes, train.batches_per_epoch) == (3, 2)
    assert {int(each) for _, targets in train.epoch(0) for each in targets} <= {0, 1, 2}
    with pytest.raises(DataError, match=r"data\.label_column=kind.*fine_label, img"):
        create_train_loader(settings.model_copy(update={"label_column": "kind"}), RGB, seed=0)
    fresh = settings.model_copy(update={"download": False, "data_path": str(tmp_path / "fresh")})
    with pytest.raises(DataError, match="--download"):
        create_train_loader(fresh, RGB, seed=0)
