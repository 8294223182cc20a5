"""Loaders are a pure function of (seed, epoch, position): resumed, divided over ranks, made by other processes."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import TrainLoader, create_eval_loader, create_train_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

SPEC = Preprocessing((1, 12, 8), (0.5,), (0.5,))
MIXED: dict[str, Any] = {"aa": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "reprob": 0.5}

Batches = list[tuple[Tensor, Tensor]]


def digits(world: tuple[int, int] = (0, 1), seed: int = 0, **keys: Any) -> TrainLoader:
    settings: dict[str, Any] = {"dataset": "digits", "workers": 0, "batch_size": 4, "train_samples": 30}
    config = DataConfig(**settings | {"aa": "affine"} | keys)
    return create_train_loader(config, SPEC, seed=seed, rank=world[0], world_size=world[1])


def same(first: Batches, second: Batches) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def rows(batches: Batches) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in batches for image in images}


LOADER = digits(**MIXED)
EPOCHS = {epoch: list(LOADER.epoch(epoch)) for epoch in range(2)}


@given(st.integers(0, 1), st.integers(0, 8))
@settings(max_examples=12)
def test_an_epoch_can_start_at_any_batch(epoch: int, start: int) -> None:
    assert same(list(LOADER.epoch(epoch, start)), EPOCHS[epoch][start:])


@pytest.mark.parametrize("keys", [{}, MIXED])
def test_the_number_of_processes_changes_no_bit(keys: dict[str, Any]) -> None:
    alone, together = digits(**keys), digits(workers=2, **keys)
    for epoch, start in ((0, 0), (1, 3), (0, 0)):
        assert same(list(alone.epoch(epoch, start)), list(together.epoch(epoch, start)))


def test_an_abandoned_pass_leaves_no_trace() -> None:
    loader = digits(workers=2)
    next(loader.epoch(0))
    unfinished = loader.epoch(1)
    next(unfinished)
    assert same(list(loader.epoch(1)), list(digits().epoch(1)))


def test_seeds_and_epochs_give_other_images() -> None:
    passes = [list(digits(seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    images = [rows(batches) for batches in passes]
    assert all(not a & b for place, a in enumerate(images) for b in images[:place])


def test_two_ranks_see_the_whole_epoch_once_and_what_one_rank_sees() -> None:
    one = rows(list(digits(batch_size=6).epoch(0)))
    ranks = [rows(list(digits((rank, 2), batch_size=3).epoch(0))) for rank in (0, 1)]
    assert not ranks[0] & ranks[1]
    assert ranks[0] | ranks[1] == one
    assert len(one) == 30


def test_a_run_goes_on_with_other_numbers_of_ranks() -> None:
    """One rank for two batches, two ranks for two, one to the end: each sample once, augmented the same."""
    one = list(digits(batch_size=3).epoch(0))
    pair = [digits((rank, 2), batch_size=3) for rank in (0, 1)]
    middle = chain.from_iterable(list(loader.epoch_from(0, 6))[:2] for loader in pair)
    resumed = one[:2] + list(middle) + list(digits(batch_size=3).epoch_from(0, 18))
    assert rows(resumed) == rows(one)
    assert sum(len(images) for images, _ in resumed) == 30


def test_resuming_reads_no_image_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftvit.transfer.data.digits import DigitsSource

    seen: list[int] = []
    read = DigitsSource.read
    monkeypatch.setattr(DigitsSource, "read", lambda self, index: seen.append(index) or read(self, index))
    list(digits().epoch(0, start=5))
    assert len(seen) == 2 * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_runs_generators_are_untouched(workers: int) -> None:
    loader = digits(workers=workers, **MIXED)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index]
    list(loader.epoch(0))
    list(create_eval_loader(DataConfig(dataset="digits", workers=0), SPEC))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_runs_generators_do_not_matter() -> None:
    torch.manual_seed(1)
    random.seed(1)
    first = list(digits(**MIXED).epoch(0))
    torch.manual_seed(2)
    random.seed(2)
    assert same(first, list(digits(**MIXED).epoch(0)))


@pytest.mark.parametrize(
    ("samples", "batch", "world", "batches", "size"),
    [(30, 4, 1, 7, 4), (30, 64, 1, 1, 30), (30, 64, 4, 1, 7), (10, 1, 1, 10, 1), (7, 3, 2, 1, 3)],
)
def test_every_rank_has_the_same_number_of_batches(
    samples: int, batch: int, world: int, batches: int, size: int
) -> None:
    for rank in range(world):
        loader = digits((rank, world), batch_size=batch, train_samples=samples, **MIXED)
        made = list(loader.epoch(0))
        assert loader.batches_per_epoch == len(made) == batches
        assert all(images.shape == (size, *SPEC.input_size) for images, _ in made)
        assert all(targets.shape == (size, 10) for _, targets in made)


def test_labels_are_numbers_without_mixing() -> None:
    images, targets = next(digits(smoothing=0.1).epoch(0))
    assert targets.dtype == torch.int64
    assert images.dtype == torch.float32
    assert (digits().num_samples, digits().num_classes) == (30, 10)


def test_the_subset_is_balanced_and_goes_by_its_seed() -> None:
    labels = torch.cat([targets for _, targets in digits(batch_size=1).epoch(0)])
    assert torch.bincount(labels).tolist() == [3] * 10
    assert rows(list(digits(label_seed=1).epoch(0))) != rows(list(digits().epoch(0)))


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match="train_samples=2000 is more than the 1297 images"):
        digits(train_samples=2000)
    for classes in (5, 12):
        with pytest.raises(
            ConfigError, match=f"num_classes={classes}, but the data set has 10 named classes"
        ):
            digits(num_classes=classes)
    with pytest.raises(DataError, match="2 images, fewer than 3 ranks"):
        digits((0, 3), train_samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once(world: int, workers: int) -> None:
    config = DataConfig(dataset="digits", eval_batch_size=64, workers=workers)
    loaders = [create_eval_loader(config, SPEC, rank=rank, world_size=world) for rank in range(world)]
    made = [list(loader) for loader in loaders]
    assert {loader.num_samples for loader in loaders} == {500}
    assert len({len(batches) for batches in made}) == 1
    seen = Counter(
        image.numpy().tobytes() for batches in made for batch, _, valid in batches for image in batch[valid]
    )
    whole = create_eval_loader(config, SPEC)
    assert seen == Counter(image.numpy().tobytes() for batch, _, valid in whole for image in batch[valid])
    assert seen.total() == 500
    assert all(len(images) == 64 for batches in made for images, *_ in batches)


def test_non_square_images_of_many_sizes_become_one_batch(tmp_path: Path) -> None:
    for number, size in enumerate([(3, 90), (90, 3), (1, 1), (50, 40)]):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / "train" / "a" / f"{number}.png")
    config = DataConfig(data_path=str(tmp_path), batch_size=4, workers=0, val_split="train")
    spec = Preprocessing((3, 24, 16), (0.5,) * 3, (0.5,) * 3)
    assert next(create_train_loader(config, spec, seed=0).epoch(0))[0].shape == (4, 3, 24, 16)
    assert next(iter(create_eval_loader(config, spec)))[0].shape == (4, 3, 24, 16)
