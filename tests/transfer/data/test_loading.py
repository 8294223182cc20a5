"""What goes wrong while loading: unreadable images, failing steps, dying processes, signals to the whole job."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.analysis.visualize.map_page import read_images
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders, loading
from graftvit.transfer.data.augment import eval_transform
from graftvit.transfer.data.datasets import open_dataset
from graftvit.transfer.data.image_folder import open_image
from graftvit.transfer.data.labels import real_labels
from graftvit.transfer.data.loaders import EvalLoader, TrainLoader, create_eval_loader, create_train_loader
from graftvit.transfer.data.streams import Columns, HubImages
from PIL import Image, ImageOps
from support.files.data_sets import image, write_classes
from support.runs.patience import PATIENCE
from torch.utils.data import IterableDataset
from torchvision import transforms

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
GOOD = 9


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Nine good images, and a corrupt JPEG, a truncated PNG, an empty file and a text file among them."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    pixels = [Image.fromarray(random.randint(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(GOOD + 2)]
    for number in range(GOOD):
        pixels[number].save(folder / f"good{number}.png")
    pixels[GOOD].save(folder / "corrupt.jpg")
    (folder / "corrupt.jpg").write_bytes((folder / "corrupt.jpg").read_bytes()[:2] + b"\0" * 300)
    pixels[GOOD + 1].save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    return tmp_path


BAD = {"corrupt.jpg", "truncated.png", "empty.png", "text.png"}


def loader(root: Path, **keys: Any) -> TrainLoader:
    keys = {"batch_size": 13, "workers": 0, "aa": None, "max_bad_images": 4} | keys
    return create_train_loader(DataConfig(data_path=str(root), **keys), SPEC, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_reported_once_and_counted(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    train = loader(damaged, workers=workers, batch_size=5)
    with caplog.at_level(logging.WARNING):
        made = [list(train.epoch(epoch)) for epoch in (0, 1, 2, 3)]
    assert {Path(path).name for path in train.bad_images} == BAD
    assert len(train.bad_images) == len(BAD)
    assert sum("unreadable" in record.message for record in caplog.records) == len(BAD)
    again = [list(loader(damaged, batch_size=5).epoch(epoch)) for epoch in (0, 1, 2, 3)]
    for first, second in zip(made, again, strict=True):
        assert [images.shape[0] for images, _ in first] == [5, 5]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_stop_the_run(damaged: Path, workers: int) -> None:
    with pytest.raises(
        DataError, match=r"4 of \d+ images .*, more than data\.max_bad_images=3 allows.*/train/a/"
    ):
        list(loader(damaged, workers=workers, max_bad_images=3).epoch(0))
    assert len(list(loader(damaged, workers=workers, max_bad_images=4).epoch(0))) == 1
    keys = {"val_split": "train", "eval_batch_size": 4, "workers": workers, "max_bad_images": 4}
    evaluation = create_eval_loader(config(damaged, **keys), SPEC)
    assert valid_images(evaluation) == GOOD, "they are left out"
    assert {Path(path).name for path in evaluation.bad_images} == BAD
    for path in (damaged / "train" / "a").glob("good*"):
        path.unlink()
    with pytest.raises(DataError, match="of the 4 images of class 'a' cannot be read; the first is"):
        list(loader(damaged, workers=workers).epoch(0))


def children() -> set[int]:
    listed = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False)
    return {int(line) for line in listed.stdout.split()}


def workers_of(train: TrainLoader) -> tuple[Any, set[int]]:
    before = children()
    batches = train.epoch(0)
    next(batches)
    found = {pid for pid in children() - before if Path(f"/proc/{pid}/cmdline").exists()}
    return batches, found


def digits(workers: int) -> TrainLoader:
    config = DataConfig(dataset="digits", batch_size=4, workers=workers, aa="affine")
    return create_train_loader(config, Preprocessing((1, 8, 8), (0.5,), (0.5,)), seed=0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_ends_in_one_sentence(number: int) -> None:
    """Also one that obeys the run, which ends its loaders by SIGTERM."""
    train = digits(2)
    batches, found = workers_of(train)
    os.kill(found.pop(), number)
    with pytest.raises(DataError, match="a loader process died") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    del caught  # and with it the traceback that holds the loader
    subprocess.run(["true"], check=True)  # another child ends: torch must not raise again for the dead one
    assert torch.equal(next(train.epoch(1))[0], next(digits(0).epoch(1))[0])


def kill_and_wait(pid: int) -> None:
    """The wait ends by what torch's handler of SIGCHLD raises."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(PATIENCE)


def test_a_process_that_dies_between_two_epochs_is_told_and_replaced() -> None:
    train = digits(1)
    batches, found = workers_of(train)
    assert len(list(batches)) == 1297 // 4 - 1
    with pytest.raises(RuntimeError, match="killed by signal"):
        kill_and_wait(found.pop())
    with pytest.raises(DataError, match="a loader process died") as caught:
        list(train.epoch(1))
    del caught  # and with it the traceback that holds the loader
    assert torch.equal(next(train.epoch(1))[0], next(digits(0).epoch(1))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_a_signal_to_the_whole_job_leaves_the_loaders_alive(name: str) -> None:
    batches, found = workers_of(digits(1))
    for pid in found:  # from another process: one from this one means that the run ends its loaders
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    assert len(list(batches)) == 1297 // 4 - 1


@pytest.mark.filterwarnings("error:This DataLoader")
def test_a_loader_of_more_processes_than_cores_is_no_warning_of_torch(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    loader = create_train_loader(DataConfig(data_path=str(damaged), batch_size=3, workers=2), SPEC, seed=0)
    assert len(next(iter(loader.epoch(0)))[0]) == 3


BORDER = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, crop_mode="border")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_classes(tmp_path, ["cat", "dog"], count=3)


def config(root: Path, **keys: Any) -> DataConfig:
    own = {"data_path": str(root), "workers": 0, "batch_size": 3, "eval_batch_size": 3, "aa": None}
    return DataConfig(**own | keys)


def refusal(batches: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(batches)
    message = str(caught.value)
    del caught  # or its traceback holds the loader, until garbage is collected
    assert "\n" not in message
    assert "Traceback" not in message
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


@pytest.mark.parametrize("target", [None, "/dev/zero", "nothing"], ids=["pipe", "device", "dangling link"])
def test_what_is_no_regular_file_is_a_bad_image(root: Path, target: str | None) -> None:
    """A pipe without a writer was waited for, and a device had no end."""
    path = root / "val" / "cat" / "0.png"
    os.mkfifo(path) if target is None else path.symlink_to(root / target)
    (root / "val" / "cat" / "hidden").mkdir()
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
    os.mkfifo(root / "train-0000.tar")
    with pytest.raises(DataError, match=r"train-0000\.tar cannot be read: it is no regular file"):
        open_dataset(config(root, dataset="wds/x", num_classes=2), "train-0000.tar", 3, training=True)


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
    assert message.startswith("2 of 48 images cannot be read, more than data.max_bad_images=0.01 allows (1);")
    for limit in (0.04, 2):
        assert valid_images(create_eval_loader(config(larger, max_bad_images=limit), SPEC)) == 46
    message = refusal(create_eval_loader(config(larger, max_bad_images=0), SPEC))
    assert "max_bad_images=0 allows (0)" in message


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
        for number in ((place * 5 + self.epoch) % 12 for place in range(12)):
            yield (Image.new("RGB", (900, 1)) if number == 2 else image(number)), number % 2


STREAMED = {"dataset": "wds/x", "num_classes": 2, "data_path": None}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_of_a_stream_is_left_out_and_counted_once(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Stream())
    monkeypatch.setattr(loaders, "train_transform", lambda *_: eval_transform(BORDER))
    keys = {**STREAMED, "workers": workers}
    train = create_train_loader(config(Path(), **keys), BORDER, seed=0)
    assert train.batches_per_epoch == 4
    for epoch in range(3):
        assert [len(images) for images, _ in train.epoch(epoch)] == [3] * 4
    assert len(train.bad_images) == 1
    evaluation = create_eval_loader(config(Path(), **keys), BORDER)
    assert [valid_images(evaluation), valid_images(evaluation)] == [11, 11]
    assert len(evaluation.bad_images) == 1
    message = refusal(create_eval_loader(config(Path(), **keys, max_bad_images=0), BORDER))
    assert "ResizeAndCenterCrop" in message
    bad = [(Image.new("RGB", (900, 1)), 0)] * 12
    monkeypatch.setattr(Stream, "__iter__", lambda self: iter(bad))
    assert "ResizeAndCenterCrop" in refusal(create_eval_loader(config(Path(), **keys), BORDER))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (b"no image at all", "is no image that can")]
)
def test_a_file_that_is_no_image_says_so(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.jpg {reason}"), open_image(path):
        pass


def broken(*_: object, **__: object) -> Image.Image:
    raise ValueError("no such\nnumber of bits")


@pytest.fixture
def failing_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("autocontrast", "equalize", "invert", "posterize", "solarize"):
        monkeypatch.setattr(ImageOps, name, broken)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("failing_policy")
def test_an_operation_of_a_policy_is_named_with_its_image(root: Path, workers: int) -> None:
    train = create_train_loader(config(root, workers=workers, aa="rand-m10-p1"), SPEC, seed=0)
    message = refusal(batch for epoch in range(9) for batch in train.epoch(epoch))
    assert all(part in message for part in (f"{root}/train/", "data.aa=rand-m10-p1", "RandAugment"))
    assert any(name in message for name in ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize"))
    assert message.endswith("ValueError: no such number of bits")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_of_evaluation_is_named_with_its_image(
    root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms.CenterCrop, "forward", broken)
    message = refusal(create_eval_loader(config(root, workers=workers), SPEC))
    assert f"{root}/val/cat/010.png" in message
    assert "CenterCrop of the evaluation transform" in message


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("failing_policy")
def test_a_stream_names_the_place_of_the_image(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**STREAMED, "workers": workers, "aa": "rand-m10-p1", "max_bad_images": 0}
    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Stream())
    message = refusal(create_train_loader(config(Path(), **keys), SPEC, seed=0).epoch(0))
    assert "of the stream" in message
    assert "data.aa=rand-m10-p1" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_fails_is_no_traceback(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Stream):
        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            yield from [(image(number), 0) for number in range(8)]
            raise KeyError("cls")

    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Failing())
    keys = {**STREAMED, "workers": workers, "eval_batch_size": 2}
    message = refusal(create_eval_loader(config(Path(), **keys), SPEC))
    assert "after 8 images" in message
    assert message.endswith("KeyError: 'cls'")


def test_a_transform_by_itself_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms.Resize, "forward", broken)
    message = refusal(eval_transform(SPEC)(image) for image in [Image.new("RGB", (9, 9))])
    step = "ResizeAndCenterCrop of the evaluation transform"
    assert message.startswith(f"{step} (crop_pct=1, crop_mode=center, interpolation=bicubic)")
