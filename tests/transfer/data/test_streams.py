"""Streams: resumed by fast-forward, evaluated exactly over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data import loaders as data
from graftvit.transfer.data.loaders import create_eval_loader, create_train_loader
from PIL import Image
from torch.utils.data import IterableDataset

SPEC = Preprocessing((1, 4, 4), (0.0,), (1.0,))


class Stream(IterableDataset[Any]):
    """Grey images whose brightness is their number, in an order of the epoch's, as timm's streams have it."""

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


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "open_dataset", lambda *_, **__: Stream(23))


CONFIG = DataConfig(dataset="wds/x", num_classes=3, batch_size=4, workers=0, aa="affine", mixup=0.8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 2, 5])
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


def test_a_stream_gives_as_many_batches_as_the_run_began_with() -> None:
    loader = create_train_loader(CONFIG, SPEC, seed=0)
    loader.batches_per_epoch = 7
    assert [len(images) for images, _ in loader.epoch(1)] == [4] * 7


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_each_image_once(world: int) -> None:
    seen: list[int] = []
    batches = set()
    for rank in range(world):
        made = list(create_eval_loader(CONFIG, SPEC, rank=rank, world_size=world))
        batches.add(len(made))
        seen += [round(float(image.max() * 255)) for images, _, valid in made for image in images[valid]]
    assert len(batches) == 1
    assert sorted(seen) == list(range(23))


def test_what_needs_an_index_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_samples=4 needs samples by index"):
        create_train_loader(CONFIG.model_copy(update={"train_samples": 4}), SPEC, seed=0)
    with pytest.raises(ConfigError, match="another number of ranks"):
        create_train_loader(CONFIG, SPEC, seed=0).epoch_from(0, 4)
    with pytest.raises(ConfigError, match=r"data\.num_classes must be set"):
        create_train_loader(CONFIG.model_copy(update={"num_classes": None}), SPEC, seed=0)
