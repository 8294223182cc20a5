"""Repeated augmentation: an epoch shows one image in R, each R times, whatever the number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.launch.cli import main
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import TrainLoader, create_train_loader
from graftvit.transfer.data.sampler import derive_seed, epoch_order, train_requests
from graftvit.transfer.data.streams import check_without_index
from hypothesis import given
from hypothesis import strategies as st
from support.runs.engine_runs import make_teacher
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor

SPEC = Preprocessing((1, 12, 8), (0.5,), (0.5,))
Batches = list[tuple[Tensor, Tensor]]


def digits(rank: int = 0, world: int = 1, **keys: Any) -> TrainLoader:
    settings: dict[str, Any] = {
        "dataset": "digits", "workers": 0, "batch_size": 6, "train_samples": 30, "aug_repeats": 3,
    }  # fmt: skip
    config = DataConfig(**settings | {"aa": "affine"} | keys)
    return create_train_loader(config, SPEC, seed=0, rank=rank, world_size=world)


def rows(batches: Batches) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


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
    repeated, plain = rows(list(digits().epoch(0))), rows(list(digits(aug_repeats=1).epoch(0)))
    assert len(set(repeated)) == len(repeated) == 30
    order, single = epoch_order(30, 0, 0, 3), epoch_order(30, 0, 0).tolist()
    for position in range(0, 30, 3):
        assert len({*order[position : position + 3].tolist()}) == 1
        assert repeated[position] == plain[single.index(order[position])]


def test_without_augmentation_the_copies_are_equal() -> None:
    config = {"aa": None, "crop_scale": (1.0, 1.0), "hflip": 0.0}
    images = torch.cat([images for images, _ in digits(**config).epoch(0)])
    assert images.unflatten(0, (10, 3)).sub(images[::3].unsqueeze(1)).abs().max() == 0


def test_mixing_pairs_images_of_a_batch_as_ever() -> None:
    batches = list(digits(mixup=0.8, cutmix=1.0).epoch(0))
    assert all(targets.shape == (6, 10) for _, targets in batches)
    assert all(torch.allclose(targets.sum(1), torch.ones(6)) for _, targets in batches)


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 2), (6, 1)])
def test_ranks_share_each_step_of_one_rank(world: int, batch: int) -> None:
    one = [rows([step]) for step in digits().epoch(0)]
    shares = [list(digits(rank, world, batch_size=batch).epoch(0)) for rank in range(world)]
    for step, expected in enumerate(one):
        assert rows([share[step] for share in shares]) == expected


def test_an_epoch_resumes_at_any_batch_with_any_number_of_ranks_and_processes() -> None:
    one = list(digits().epoch(1))
    assert rows(list(digits().epoch(1, start=3))) == rows(one[3:])
    assert rows(list(digits(workers=2).epoch(1))) == rows(one)
    pair = [list(digits(rank, 2, batch_size=3).epoch_from(1, 12))[:1] for rank in (0, 1)]
    rest = list(digits().epoch_from(1, 18))
    assert rows([*one[:2], *chain.from_iterable(pair), *rest]) == rows(one)


def test_seeds_of_copies_differ_from_those_of_samples() -> None:
    first = {derive_seed(1, 0, 0, index) for index in range(50)}
    copies = {derive_seed(1, 0, 0, index, copy) for index in range(50) for copy in (1, 2)}
    assert len(first | copies) == 150


def test_fixed_views_are_shown_once() -> None:
    assert rows(list(digits(views=2).epoch(0))) == rows(list(digits(views=2, aug_repeats=1).epoch(0)))


def test_a_stream_refuses_what_needs_numbers() -> None:
    for name, value in (("aug_repeats", 3), ("views", 2), ("train_samples", 9)):
        config = DataConfig.model_validate({"dataset": "wds/shards", name: value})
        with pytest.raises(
            ConfigError, match=rf"^data\.{name}={value} needs samples by index; wds/shards is a stream: leave"
        ):
            check_without_index(config)
    check_without_index(DataConfig(dataset="wds/shards", views=0))


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
