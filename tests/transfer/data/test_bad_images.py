"""Whatever goes wrong with one image counts it as a bad one, and the sentence has file and cause."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.analysis.visualize.map_page import read_images
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders, loading
from graftvit.transfer.data.augment import eval_transform
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.image_folder import open_image
from graftvit.transfer.data.labels import real_labels
from graftvit.transfer.data.loaders import EvalLoader, create_eval_loader, create_train_loader
from graftvit.transfer.data.streams import Columns, HubImages
from PIL import Image
from support.files.data_sets import image, write_classes
from torch.utils.data import IterableDataset
from torchvision import transforms

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
BORDER = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, crop_mode="border")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_classes(tmp_path, ["cat", "dog"], count=3)


def config(root: Path, **keys: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"data_path": str(root), "workers": 0, "batch_size": 3, "eval_batch_size": 3, "aa": None, **keys}
    )


def refusal(batches: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(batches)
    message = str(caught.value)
    del caught  # or its traceback holds the loader, until garbage is collected
    assert "\n" not in message
    return message


def valid_images(loader: EvalLoader) -> int:
    return sum(int(valid.sum()) for *_, valid in loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_a_transform_refuses_is_left_out(root: Path, workers: int) -> None:
    """An image of 900 x 1 has no row left when its longer side is made to fit."""
    thin = root / "val" / "cat" / "thin.png"
    Image.new("RGB", (900, 1)).save(thin)
    loader = create_eval_loader(config(root, workers=workers), BORDER)
    assert valid_images(loader) == 6
    assert loader.bad_images == [str(thin)]
    message = refusal(create_eval_loader(config(root, workers=workers, max_bad_images=0), BORDER))
    assert f"the first is {thin}" in message
    assert "ResizeAndCenterCrop of the evaluation transform" in message
    assert "crop_mode=border" in message


def test_a_training_image_that_a_transform_refuses_is_replaced(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (13, 13)
    image(5, 13).save(root / "train" / "cat" / "odd.png")
    plain = transforms.ToTensor.__call__

    def refuse(self: Any, picture: Image.Image) -> Any:
        if picture.size == size:
            raise ValueError("no\nodd ones")
        return plain(self, picture)

    made = transforms.Compose([transforms.ToTensor(), transforms.Resize((8, 8))])
    monkeypatch.setattr(transforms.ToTensor, "__call__", refuse)
    monkeypatch.setattr(loaders, "train_transform", lambda *_: made)
    train = create_train_loader(config(root), SPEC, seed=0)
    for epoch in range(3):
        assert [len(images) for images, _ in train.epoch(epoch)] == [3, 3]
    assert [Path(path).name for path in train.bad_images] == ["odd.png"]
    message = refusal(create_train_loader(config(root, max_bad_images=0), SPEC, seed=0).epoch(0))
    assert message.endswith("odd.png: ValueError: no odd ones")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link"])
def test_what_is_no_regular_file_is_a_bad_image(root: Path, kind: str) -> None:
    """A pipe without a writer was waited for, and a device had no end."""
    path = root / "val" / "cat" / "0.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        (root / "val" / "cat" / "hidden").mkdir()
        path.symlink_to(root / "nothing")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else root / "nothing")
    loader = create_eval_loader(config(root), SPEC)
    assert valid_images(loader) == 6
    assert loader.bad_images == [str(path)]


def is_no_regular_file(source: Any) -> bool:
    found = loading.prepared(source, 0, eval_transform(SPEC))
    return isinstance(found, loading.BadImage) and "is a pipe, not a regular file" in found.reason


def test_a_pipe_in_other_data_sets_is_a_bad_image(root: Path) -> None:
    pipe = root / "train" / "cat" / "0.png"
    os.mkfifo(pipe)
    keys = {"dataset": "torch/image_folder", "data_path": str(root)}
    assert is_no_regular_file(open_dataset(config(root, **keys), "train", 3, training=True))
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": None, "path": str(pipe)}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features=features)
    assert is_no_regular_file(HubImages(table, Columns("image", "label"), "RGB", "x", None))


def test_a_pipe_in_place_of_a_list_or_of_shards_is_refused(root: Path) -> None:
    pipe = root / "names.txt"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match=r"names\.txt is a pipe, not a regular file"):
        open_dataset(config(root, classes=str(pipe)), "train", 3, training=True)
    with pytest.raises(DataError, match=r"the ReaL labels: .* is a pipe"):
        real_labels(["ILSVRC2012_val_00000001.JPEG"], pipe)
    with pytest.raises(DataError, match=r"not a folder or a \.tar file"):
        open_dataset(config(pipe), "train", 3, training=True)
    (root / "one").mkdir()
    os.mkfifo(root / "one" / "0.png")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_images([str(root / "one")], SPEC)
    pytest.importorskip("webdataset")
    os.mkfifo(root / "train-0000.tar")
    with pytest.raises(DataError, match=r"train-0000\.tar is no regular file"):
        open_dataset(config(root, dataset="wds/x", num_classes=2), "train", 3, training=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_memory_names_the_image(root: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the image, which is not left out; and no traceback."""

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(transforms.Resize, "forward", exhausted)
    message = refusal(create_eval_loader(config(root, workers=workers), SPEC))
    assert f"the memory is full at {root}/val/cat/010.png" in message
    assert "data.workers" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_error_of_a_loader_process_is_one_sentence(
    root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("not\nthis way")

    monkeypatch.setattr(loading, "mix", broken)
    train = create_train_loader(config(root, workers=workers, mixup=0.5), SPEC, seed=0)
    message = refusal(train.epoch(0))
    assert "ZeroDivisionError: not this way" in message
    assert f"{root}/train/" in message


def damage(folder: Path, count: int) -> None:
    for path in sorted(folder.glob("*.png"))[:count]:
        path.write_text("no image")


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """Three classes of 16 images in each split."""
    return write_classes(tmp_path / "larger", ["ant", "bee", "cow"], count=16)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_class_that_lost_most_of_its_images_is_named(larger: Path, split: str, ranks: int) -> None:
    """A whole class of 16 images vanished, and the run ended as if nothing had happened."""

    def batches(limit: float) -> Any:
        settings = config(larger, max_bad_images=limit)
        if split == "train":
            train = create_train_loader(settings, SPEC, seed=0, rank=0, world_size=ranks)
            return (batch for epoch in range(20) for batch in train.epoch(epoch))
        return create_eval_loader(settings, SPEC, rank=0, world_size=ranks)

    damage(larger / split / "bee", 8)
    list(batches(100))
    damage(larger / split / "bee", 16)
    message = refusal(batches(100))
    assert re.search(r"\d+ of the \d+ images of class 'bee' cannot be read; the first is ", message)
    assert f"{larger}/{split}/bee/" in message
    assert "data.classes" in message


def test_by_default_one_in_a_hundred_images_may_be_bad(larger: Path) -> None:
    damage(larger / "val" / "bee", 1)
    assert valid_images(create_eval_loader(config(larger), SPEC)) == 47
    damage(larger / "val" / "cow", 1)
    message = refusal(create_eval_loader(config(larger), SPEC))
    assert message.startswith(
        "2 of 48 images cannot be read, more than data.max_bad_images=0.01 allows (1); the"
    )
    assert valid_images(create_eval_loader(config(larger, max_bad_images=0.04), SPEC)) == 46
    assert valid_images(create_eval_loader(config(larger, max_bad_images=2), SPEC)) == 46
    assert "max_bad_images=0 allows (0)" in refusal(
        create_eval_loader(config(larger, max_bad_images=0), SPEC)
    )


def test_a_split_without_a_readable_image_is_not_called_empty(root: Path) -> None:
    for number, path in enumerate(sorted((root / "val").rglob("*.png"))):
        path.write_text("no image")
        path.rename(root / "val" / f"{number}.png")
    for name in ("cat", "dog"):
        (root / "val" / name).rmdir()
    loader = create_eval_loader(config(root, max_bad_images=6), SPEC, labels=False)
    message = refusal(loader)
    assert "none of the 6 images can be read" in message
    assert f"{root}/val/0.png: is no image that can be read" in message
    assert "empty" not in message


class Stream(IterableDataset[Any]):
    """Twelve images in an order that differs by epoch; the third of the set is a bad one."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for place in range(12):
            number = (place * 5 + self.epoch) % 12
            yield (Image.new("RGB", (900, 1)) if number == 2 else image(number)), number % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_of_a_stream_is_left_out_and_counted_once(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Stream())
    monkeypatch.setattr(loaders, "train_transform", lambda *_: eval_transform(BORDER))
    keys = {"dataset": "wds/x", "num_classes": 2, "workers": workers, "data_path": None}
    train = create_train_loader(config(Path(), **keys), BORDER, seed=0)
    assert train.batches_per_epoch == 4
    for epoch in range(3):
        assert [len(images) for images, _ in train.epoch(epoch)] == [3] * 4
    assert len(train.bad_images) == 1
    evaluation = create_eval_loader(config(Path(), **keys), BORDER)
    assert [valid_images(evaluation), valid_images(evaluation)] == [11, 11]
    assert len(evaluation.bad_images) == 1
    message = refusal(create_eval_loader(config(Path(), **keys | {"max_bad_images": 0}), BORDER))
    assert "ResizeAndCenterCrop" in message


def test_a_stream_of_bad_images_alone_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(Stream):
        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            for _ in range(12):
                yield Image.new("RGB", (900, 1)), 0

    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Bad())
    keys = {"dataset": "wds/x", "num_classes": 2, "data_path": None}
    assert "ResizeAndCenterCrop" in refusal(create_eval_loader(config(Path(), **keys), BORDER))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (b"no image at all", "is no image that can")]
)
def test_a_file_that_is_no_image_says_so(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.jpg {reason}"), open_image(path):
        pass
