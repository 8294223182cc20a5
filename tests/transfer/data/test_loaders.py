"""Loaders are a pure function of (seed, epoch, position): resumed, repeated, over ranks, by other processes."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.launch.cli import main
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.digits import DigitsSource
from graftvit.transfer.data.loaders import TrainLoader, create_eval_loader, create_train_loader
from graftvit.transfer.data.sampler import derive_seed, epoch_order, train_requests
from graftvit.transfer.data.streams import check_without_index
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.runs.engine_runs import make_teacher
from timm.data.distributed_sampler import RepeatAugSampler
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


def pixels(batches: Batches) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


def rows(batches: Batches) -> set[bytes]:
    return set(pixels(batches))


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


def test_the_subset_is_balanced_and_goes_by_its_seed() -> None:
    loader = digits(batch_size=1, smoothing=0.1)
    made = list(loader.epoch(0))
    assert (loader.num_samples, loader.num_classes) == (30, 10)
    assert {(images.dtype, targets.dtype) for images, targets in made} == {(torch.float32, torch.int64)}
    assert torch.bincount(torch.cat([targets for _, targets in made])).tolist() == [3] * 10
    assert rows(list(digits(label_seed=1).epoch(0))) != rows(list(digits().epoch(0)))


def test_some_validation_images_are_balanced_and_the_same_on_each_rank_and_with_each_seed() -> None:
    config = DataConfig(dataset="digits", workers=0, eval_batch_size=7, val_samples=30)
    alone = list(create_eval_loader(config, SPEC))
    assert torch.bincount(torch.cat([targets[valid] for _, targets, valid in alone])).tolist() == [3] * 10
    seeded = config.model_copy(update={"train_samples": 20, "label_seed": 1})
    ranks = [create_eval_loader(seeded, SPEC, rank=rank, world_size=2) for rank in range(2)]
    assert [loader.num_samples for loader in ranks] == [30, 30]

    def images(batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Counter[bytes]:
        return Counter(each.numpy().tobytes() for batch, _, valid in batches for each in batch[valid])

    whole = images(create_eval_loader(config.model_copy(update={"val_samples": None}), SPEC))
    assert images(alone) == images(itertools.chain(*ranks)) <= whole
    with pytest.raises(ConfigError, match="val_samples=501 is more than the 500 images of 'validation'"):
        create_eval_loader(config.model_copy(update={"val_samples": 501}), SPEC)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match="train_samples=2000 is more than the 1297 images"):
        digits(train_samples=2000)
    evaluate = partial(create_eval_loader, spec=SPEC)
    for create, classes in itertools.product(
        (partial(create_train_loader, spec=SPEC, seed=0), evaluate), (5, 12)
    ):
        config = DataConfig(dataset="digits", workers=0, num_classes=classes)
        with pytest.raises(ConfigError, match=f"num_classes={classes}, .* has 10 named classes.*none"):
            create(config)
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


def repeated(rank: int = 0, world: int = 1, **keys: Any) -> TrainLoader:
    return digits((rank, world), **{"batch_size": 6, "aug_repeats": 3} | keys)


@given(st.integers(1, 90), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_shows_one_sample_in_r_as_often(size: int, repeats: int, seed: int, epoch: int) -> None:
    order = epoch_order(size, seed, epoch, repeats)
    whole, rest = divmod(size, repeats)
    assert sorted(Counter(order.tolist()).values()) == sorted([repeats] * whole + [rest] * (rest > 0))
    plain = epoch_order(size, seed, epoch)
    assert list(dict.fromkeys(order.tolist())) == plain[: whole + (rest > 0)].tolist()


@given(st.integers(1, 4), st.integers(1, 9), st.integers(30, 90), st.integers(1, 4))
def test_the_steps_have_the_samples_of_timms_sampler(world: int, batch: int, size: int, repeats: int) -> None:
    """timm draws another permutation; both take the same places of theirs in each step over all ranks."""
    ours = epoch_order(size, 3, 5, repeats)
    place = {int(sample): number for number, sample in enumerate(dict.fromkeys(ours.tolist()))}
    timms = [
        list(RepeatAugSampler(range(size), world, rank, shuffle=False, num_repeats=repeats, selected_round=0))
        for rank in range(world)
    ]
    requests = [
        list(train_requests(ours, 5, batch_size=batch, rank=rank, world_size=world)) for rank in range(world)
    ]
    for step in range(size // (batch * world)):
        mine = chain.from_iterable(each[step].indices for each in requests)
        theirs = chain.from_iterable(each[step * batch : (step + 1) * batch] for each in timms)
        assert Counter(place[index] for index in mine) == Counter(theirs)


def test_copies_are_augmented_apart_and_the_first_is_that_of_a_plain_epoch() -> None:
    many, plain = pixels(list(repeated().epoch(0))), pixels(list(repeated(aug_repeats=1).epoch(0)))
    assert len(set(many)) == len(many) == 30
    order, single = epoch_order(30, 0, 0, 3), epoch_order(30, 0, 0).tolist()
    for position in range(0, 30, 3):
        assert len({*order[position : position + 3].tolist()}) == 1
        assert many[position] == plain[single.index(order[position])]
    config = {"aa": None, "crop_scale": (1.0, 1.0), "hflip": 0.0}
    images = torch.cat([images for images, _ in repeated(**config).epoch(0)])
    assert images.unflatten(0, (10, 3)).sub(images[::3].unsqueeze(1)).abs().max() == 0, "without augmentation"
    views = [list(repeated(views=2, aug_repeats=repeats).epoch(0)) for repeats in (3, 1)]
    assert same(*views), "fixed views are shown once"
    for _, targets in repeated(mixup=0.8, cutmix=1.0).epoch(0):
        assert targets.shape == (6, 10)
        assert torch.allclose(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 2), (6, 1)])
def test_ranks_share_each_step_of_one_rank(world: int, batch: int) -> None:
    one = [pixels([step]) for step in repeated().epoch(0)]
    shares = [list(repeated(rank, world, batch_size=batch).epoch(0)) for rank in range(world)]
    for step, expected in enumerate(one):
        assert pixels([share[step] for share in shares]) == expected


def test_an_epoch_resumes_at_any_batch_with_any_number_of_ranks_and_processes() -> None:
    one = list(repeated().epoch(1))
    assert pixels(list(repeated().epoch(1, start=3))) == pixels(one[3:])
    assert pixels(list(repeated(workers=2).epoch(1))) == pixels(one)
    pair = [list(repeated(rank, 2, batch_size=3).epoch_from(1, 12))[:1] for rank in (0, 1)]
    rest = list(repeated().epoch_from(1, 18))
    assert pixels([*one[:2], *chain.from_iterable(pair), *rest]) == pixels(one)


def test_seeds_of_copies_differ_from_those_of_samples() -> None:
    first = {derive_seed(1, 0, 0, index) for index in range(50)}
    copies = {derive_seed(1, 0, 0, index, copy) for index in range(50) for copy in (1, 2)}
    assert len(first | copies) == 150


def test_a_stream_refuses_what_needs_numbers() -> None:
    for name, value in (("aug_repeats", 3), ("views", 2), ("train_samples", 9), ("val_samples", 9)):
        config = DataConfig.model_validate({"dataset": "wds/shards", name: value})
        with pytest.raises(
            ConfigError, match=rf"^data\.{name}={value} needs samples by index; .* stream: leave"
        ):
            check_without_index(config, name)
    check_without_index(DataConfig(dataset="wds/shards", views=0), "views")


def test_the_plan_says_what_an_epoch_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    words = (
        f"train --mode finetune --model local-dir:{teacher} --dataset digits --batch_size 64 "
        f"--epochs 8 --aug_repeats 3 --output_dir {tmp_path / 'run'} --dry_run"
    ).split()
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1,297 training images, 10 classes; an epoch shows 433 of them 3 times each" in shown
    assert "160 steps, 20 an epoch" in shown
    assert main([*words, "--train_samples", "64", "--aug_repeats", "100"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "64 training images, 10 classes; an epoch shows 1 of them 64 times each" in shown
    assert main([*words, "--views", "2"]) == 2
    refused = capsys.readouterr().err
    assert "data.aug_repeats=3 changes nothing beside data.views=2" in refused


def test_the_order_is_fixed() -> None:
    """Runs resume across releases."""
    assert epoch_order(8, 0, 0, 3).tolist() == [7, 7, 7, 3, 3, 3, 6, 6]
    assert np.array_equal(epoch_order(8, 0, 0, 1), epoch_order(8, 0, 0))
