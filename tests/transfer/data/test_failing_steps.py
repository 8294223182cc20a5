"""A step of a transform that fails ends the run in one sentence: which image, which setting, which step, why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders
from graftvit.transfer.data.augment import eval_transform
from graftvit.transfer.data.loaders import create_eval_loader, create_train_loader
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset
from torchvision import transforms

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (9, 9)).save(tmp_path / split / "a" / f"{number}.png")
    return tmp_path


class Stream(IterableDataset[Any]):
    """Eight images that come in an order of their own, and then whatever `end` raises."""

    def __init__(self, end: Exception | None = None) -> None:
        self.end = end

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for _ in range(8):
            yield Image.new("RGB", (9, 9)), 0
        if self.end is not None:
            raise self.end


def config(workers: int, **keys: Any) -> DataConfig:
    common: dict[str, Any] = {"batch_size": 2, "eval_batch_size": 2, "num_classes": 1, "workers": workers}
    return DataConfig(**common | {"aa": "rand-m10-p1"} | keys)


def broken(*_: object, **__: object) -> Image.Image:
    raise ValueError("no such\nnumber of bits")


def refusal(batches: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(batches)
    message = str(caught.value)
    del caught  # or its traceback holds the loader, until garbage is collected
    assert "\n" not in message
    assert "Traceback" not in message
    return message


@pytest.fixture
def failing_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("autocontrast", "equalize", "invert", "posterize", "solarize"):
        monkeypatch.setattr(ImageOps, name, broken)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("failing_policy")
def test_an_operation_of_a_policy_is_named_with_its_image(folder: Path, workers: int) -> None:
    train = create_train_loader(config(workers, data_path=str(folder)), SPEC, seed=0)
    message = refusal(batch for epoch in range(9) for batch in train.epoch(epoch))
    assert f"{folder}/train/a/" in message
    assert "data.aa=rand-m10-p1" in message
    assert "RandAugment" in message
    assert any(name in message for name in ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize"))
    assert message.endswith("ValueError: no such number of bits")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_of_evaluation_is_named_with_its_image(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms.CenterCrop, "forward", broken)
    message = refusal(create_eval_loader(config(workers, data_path=str(folder)), SPEC))
    assert f"{folder}/val/a/0.png" in message
    assert "CenterCrop of the evaluation transform" in message


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.usefixtures("failing_policy")
def test_a_stream_names_the_place_of_the_image(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Stream())
    message = refusal(
        create_train_loader(config(workers, dataset="wds/x", max_bad_images=0), SPEC, seed=0).epoch(0)
    )
    assert "of the stream" in message
    assert "data.aa=rand-m10-p1" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_fails_is_no_traceback(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "open_dataset", lambda *_, **__: Stream(KeyError("cls")))
    message = refusal(create_eval_loader(config(workers, dataset="wds/x"), SPEC))
    assert "after 8 images" in message
    assert message.endswith("KeyError: 'cls'")


def test_a_transform_by_itself_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms.Resize, "forward", broken)
    message = refusal(eval_transform(SPEC)(image) for image in [Image.new("RGB", (9, 9))])
    assert message.startswith(
        "ResizeAndCenterCrop of the evaluation transform (crop_pct=1, crop_mode=center, interpolation=bicubic)"
    )
