from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from graftvit.models.errors import ConfigError, DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.augment import seed_generators
from graftvit.transfer.data.dense import (
    DenseAugment,
    DenseBatch,
    Distortion,
    create_dense_eval_loader,
    create_dense_train_loader,
    grouped_order,
)
from graftvit.transfer.data.sampler import epoch_order, train_requests
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.files.dense_scenes import Scene, composed, without_objects, write_ade20k, write_coco

SHAPES = ((128, 128), (96, 128), (128, 80))
SMALL = DenseAugment(short=(64, 80), long=100)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen images to train on, of which a third is tall, and five to evaluate on, one without an object."""
    folder = tmp_path_factory.mktemp("coco")
    tested = composed("validation", 5, SHAPES)
    write_ade20k(folder, {"training": composed("train", 6, SHAPES), "validation": tested})
    return write_coco(
        folder, {"train": composed("train", 13, SHAPES), "val": [*tested[:4], without_objects(tested[4])]}
    )


def config(root: Path, **settings: Any) -> DataConfig:
    given = {"dataset": "coco", "data_path": str(root), "batch_size": 2, "workers": 0, **settings}
    return DataConfig(**given)


def same(one: Sequence[DenseBatch], other: Sequence[DenseBatch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(tensors(first), tensors(second), strict=True)
    )


def tensors(batch: DenseBatch) -> list[torch.Tensor]:
    return [
        *batch.images,
        batch.valid,
        *(value for target in batch.targets for value in target.values() if isinstance(value, torch.Tensor)),
    ]


def ids(batches: Sequence[DenseBatch]) -> list[list[int]]:
    return [[target["image_id"] for target in batch.targets] for batch in batches]


# Training batches.


def test_an_epoch_is_a_function_of_seed_epoch_and_position(root: Path) -> None:
    def batches(epoch: int, start: int = 0, seed: int = 0, **settings: Any) -> list[DenseBatch]:
        loader = create_dense_train_loader(config(root, **settings), SMALL, seed=seed, masks=True)
        return [batch for (batch,) in loader.epoch(epoch, start)]

    whole = batches(3)
    assert len(whole) == 6
    assert same(batches(3, start=4), whole[4:])
    assert same(batches(3, workers=1), whole)
    assert not same(batches(4), whole)
    assert not same(batches(3, seed=1), whole)
    assert all(
        image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1 for image in whole[0].images
    )


def test_batches_have_one_orientation_and_any_number_of_ranks_sees_the_same(root: Path) -> None:
    def epoch(ranks: int, position: int = 0) -> list[list[int]]:
        loaders = [
            create_dense_train_loader(config(root), SMALL, seed=0, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        found = [ids([batch for (batch,) in loader.epoch_from(1, position)]) for loader in loaders]
        return [batch for step in zip(*found, strict=True) for batch in step]

    one = epoch(1)
    assert epoch(2) == one[: len(one) // 2 * 2]
    assert epoch(3) == one[: len(one) // 3 * 3]
    assert epoch(2, position=4) == one[2:6]
    loader = create_dense_train_loader(config(root), SMALL, seed=0)
    for (batch,) in list(loader.epoch(0))[:-1]:
        wide = [image.shape[2] >= image.shape[1] for image in batch.images]
        assert len(set(wide)) == 1


@given(
    st.lists(st.booleans(), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_groups_are_a_permutation_with_at_most_one_mixed_group(
    wide: list[bool], size: int, epoch: int
) -> None:
    order = epoch_order(len(wide), 0, epoch)
    found = grouped_order(order, np.array(wide), size)
    assert sorted(found) == list(range(len(wide)))
    groups = [{wide[index] for index in found[start : start + size]} for start in range(0, len(wide), size)]
    whole = sum(kind // size for kind in (sum(wide), len(wide) - sum(wide)))
    assert all(len(group) == 1 for group in groups[:whole])
    assert np.array_equal(grouped_order(order, None, size), order)


@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(1, 5), st.data())
def test_a_restart_on_other_ranks_continues_the_epoch(
    wide: list[bool], size: int, data: st.DataObject
) -> None:
    order = grouped_order(epoch_order(len(wide), 1, 2), np.array(wide), size)

    def batches(ranks: int, start: int) -> list[tuple[int, ...]]:
        parts = [
            train_requests(order, 2, batch_size=size, rank=rank, world_size=ranks, start=start)
            for rank in range(ranks)
        ]
        return [request.indices for step in zip(*parts, strict=True) for request in step]

    before, after = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    steps = data.draw(st.integers(0, len(wide) // (size * before)))
    seen = batches(before, 0)[: steps * before] + batches(after, steps * size * before)
    assert sum(seen, ()) == tuple(order[: len(seen) * size])
    assert len(wide) - len(seen) * size < size * after


def test_groups_come_in_a_random_order() -> None:
    wide = np.arange(40) % 2 == 0
    first = [wide[grouped_order(epoch_order(40, 0, epoch), wide, 4)[0]] for epoch in range(20)]
    assert 3 < sum(first) < 17


def test_few_images_make_small_batches(root: Path) -> None:
    loader = create_dense_train_loader(config(root, batch_size=64, train_samples=5), SMALL, seed=0)
    assert (loader.num_samples, loader.batch_size, loader.batches_per_epoch) == (5, 5, 1)
    assert len(next(loader.epoch(0))[0]) == 5
    assert loader.head().num_classes == 3
    with pytest.raises(ConfigError, match="train_samples=99"):
        create_dense_train_loader(config(root, train_samples=99), SMALL, seed=0)
    with pytest.raises(DataError, match="ranks"):
        create_dense_train_loader(config(root, train_samples=2), SMALL, seed=0, world_size=3)


def test_some_validation_images_are_read(root: Path) -> None:
    loader = create_dense_eval_loader(config(root, val_samples=2, eval_batch_size=3), SMALL)
    batches = list(loader)
    assert loader.num_samples == sum(int(batch.valid.sum()) for batch in batches) == 2


def test_a_bad_image_is_replaced_and_told(tmp_path: Path) -> None:
    write_coco(tmp_path, {"train": composed("train", 6)})
    (tmp_path / "train" / "000000000012.png").write_bytes(b"no image")
    loader = create_dense_train_loader(config(tmp_path, max_bad_images=1), SMALL, seed=0)
    seen = [number for batch in ids([batch for (batch,) in loader.epoch(0)]) for number in batch]
    assert len(seen) == 6
    assert 12 not in seen
    assert [Path(path).name for path in loader.bad_images] == ["000000000012.png"]
    with pytest.raises(DataError, match="max_bad_images"):
        list(create_dense_train_loader(config(tmp_path, max_bad_images=0), SMALL, seed=0).epoch(0))


# Evaluation batches.


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_image_is_evaluated_once_by_its_own_boxes(root: Path, ranks: int) -> None:
    scenes = composed("validation", 5, SHAPES)
    found = {}
    lengths = set()
    for rank in range(ranks):
        loader = create_dense_eval_loader(config(root), SMALL, rank=rank, world_size=ranks)
        batches = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert len(batch) == 2
            for image, target, valid in zip(batch.images, batch.targets, batch.valid, strict=True):
                if valid:
                    assert target["image_id"] not in found
                    found[target["image_id"]] = image, target
    assert len(lengths) == 1
    assert sorted(found) == [10, 11, 12, 13, 14]
    for number, scene in enumerate(scenes[:4]):
        image, target = found[10 + number]
        assert torch.equal(target["boxes"], torch.from_numpy(scene.boxes()))
        assert target["original_size"] == scene.pixels.shape[:2]
        height, width = target["original_size"]
        ratio = min(80 / min(height, width), 100 / max(height, width))
        assert image.shape[1:] == (round(height * ratio), round(width * ratio))
    assert len(found[14][1]["boxes"]) == 0


def test_a_bad_image_is_not_valid(tmp_path: Path) -> None:
    write_coco(tmp_path, {"val": composed("validation", 3)})
    (tmp_path / "val" / "000000000011.png").write_bytes(b"no image")
    loader = create_dense_eval_loader(config(tmp_path, max_bad_images=1), SMALL)
    assert [batch.valid.tolist() for batch in loader] == [[True, False], [True, False]]


def test_other_classes_than_the_models_are_refused(root: Path) -> None:
    names = create_dense_train_loader(config(root), SMALL, seed=0).class_names
    create_dense_eval_loader(config(root), SMALL, names=names)
    with pytest.raises(DataError, match="'coin' and 'cat'"):
        create_dense_eval_loader(config(root), SMALL, names=("cat", "dahlia", "saucer"))
    with pytest.raises(ConfigError, match="val_split"):
        create_dense_eval_loader(config(root, val_split=None), SMALL)


def test_a_batch_moves_as_a_whole(root: Path) -> None:
    (batch,) = next(create_dense_train_loader(config(root), SMALL, seed=0, masks=True).epoch(0))
    moved = send_to_device(batch, torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert moved.targets[0]["image_id"] == batch.targets[0]["image_id"]


def test_a_batch_passes_between_processes_as_one_tensor(root: Path) -> None:
    """Each tensor takes a file descriptor, and a system allows some hundreds."""
    batch = next(iter(create_dense_eval_loader(config(root, eval_batch_size=5), SMALL, masks=True)))
    counts: list[torch.Tensor] = []

    class Counting(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            counts.extend([value] if isinstance(value, torch.Tensor) else [])
            return NotImplemented

    stream = io.BytesIO()
    Counting(stream).dump(batch)
    assert len(counts) == 1
    back = pickle.loads(stream.getvalue())
    assert same([back], [batch])
    assert [target.keys() for target in back.targets] == [target.keys() for target in batch.targets]
    assert ids([back]) == ids([batch])


# Augmentation.


def item(scene: Scene) -> tuple[Image.Image, dict[str, Any]]:
    target = {
        "boxes": torch.from_numpy(scene.boxes()),
        "labels": torch.tensor(scene.labels),
        "masks": torch.from_numpy(scene.masks),
        "image_id": 0,
        "original_size": scene.pixels.shape[:2],
    }
    return Image.fromarray(scene.pixels), target


POLICIES = {
    "resize": DenseAugment(short=(60, 100, 150), long=160),
    "crop": DenseAugment(short=(60, 100), long=200, cropped=(90, 120), crop_sides=(30, 70)),
    "jitter": DenseAugment(short=(100,), long=100, scale=(0.1, 2.0), crop=100),
    "distort": DenseAugment(short=(128,), long=128, distort=True),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_boxes_and_masks_follow_the_image(policy: str) -> None:
    """A box contains its mask, and nearly touches it where the image is not cut."""
    for seed, scene in enumerate(composed("train", 12, SHAPES)):
        seed_generators(seed)
        image, target = POLICIES[policy].train(*item(scene))
        height, width = image.shape[1:]
        assert target["masks"].shape[1:] == (height, width)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert all(type(value) is torch.Tensor for value in (image, target["boxes"], target["masks"]))
        for (x0, y0, x1, y1), mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            rows, columns = mask.nonzero().unbind(1)
            if not len(rows):
                continue
            edges = torch.tensor([columns.min() - x0, rows.min() - y0, x1 - columns.max(), y1 - rows.max()])
            assert edges.min() >= -4
            if policy in ("resize", "distort"):
                assert edges.max() < 4


def test_sizes_are_those_of_the_recipe() -> None:
    wide = Image.fromarray(np.zeros((480, 640, 3), np.uint8))
    long = Image.fromarray(np.zeros((300, 1000, 3), np.uint8))
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    assert DenseAugment().train(wide, nothing)[0].shape == (3, 800, 1067)
    assert DenseAugment().evaluate(long, nothing)[0].shape == (3, 400, 1333)
    several = DenseAugment(short=tuple(range(480, 801, 32)))
    sizes = set()
    for seed in range(40):
        seed_generators(seed)
        sizes.add(several.train(wide, nothing)[0].shape[1])
    assert len(sizes) > 8
    assert sizes <= set(range(480, 801, 32))
    assert several.evaluate(wide, nothing)[0].shape == (3, 800, 1067)


@pytest.mark.parametrize(
    "sizes", [{"scale": (2.0, 0.5)}, {"scale": (0.0, 1.0)}, {"cropped": (-5,)}, {"short": ()}]
)
def test_sizes_that_no_image_has_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DenseAugment(**sizes)


def test_a_flip_mirrors_boxes_and_masks() -> None:
    scene = composed("train", 1)[0]
    augment = DenseAugment(short=(128,), long=128, hflip=1.0)
    image, target = augment.train(*item(scene))
    assert torch.equal(target["masks"], torch.from_numpy(scene.masks).flip(-1))
    mirrored = torch.from_numpy(scene.boxes())[:, [2, 1, 0, 3]]
    mirrored[:, [0, 2]] = 128 - mirrored[:, [0, 2]]
    assert torch.equal(target["boxes"], mirrored)
    pixels = torch.from_numpy(scene.pixels).permute(2, 0, 1) / 255
    assert torch.allclose(image, pixels.flip(-1))


def test_boxes_that_a_crop_leaves_nothing_of_are_left_out() -> None:
    counts = []
    for seed in range(20):
        seed_generators(seed)
        scene = composed("train", 1)[0]
        counts.append(len(POLICIES["crop"].train(*item(scene))[1]["boxes"]))
    assert min(counts) < len(composed("train", 1)[0].labels) == max(counts)


SEGMENT = DenseAugment(short=(48,), long=192, scale=(0.5, 2.0), crop=48, distort=True)


def test_labels_follow_the_image_and_keep_their_numbers(root: Path) -> None:
    data = config(root, dataset="ade20k", num_classes=3)
    loader = create_dense_train_loader(data, SEGMENT, seed=0)
    for (batch,) in loader.epoch(0):
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert max(image.shape[1:]) <= 48
            assert target["labels"].shape == image.shape[1:]
            assert target["labels"].dtype == torch.int64
            assert set(target["labels"].unique().tolist()) <= {0, 1, 2, 255}
    evaluated = list(create_dense_eval_loader(data, SEGMENT))
    assert all(
        target["labels"].shape == tuple(target["original_size"])
        for batch in evaluated
        for target in batch.targets
    )


def test_a_crop_is_drawn_again_while_one_class_has_most_of_it() -> None:
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:, 30:] = 1
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    augment = DenseAugment(short=(40,), long=40, crop=12, largest_share=0.75, hflip=0)
    never = DenseAugment(short=(40,), long=40, crop=12, largest_share=1.01, hflip=0)

    def mixed(policy: DenseAugment) -> int:
        count = 0
        for seed in range(60):
            seed_generators(seed)
            share = policy.train(image, {"labels": labels})[1]["labels"].float().mean()
            count += 0.25 < share < 0.75
        return count

    assert mixed(augment) > 35 > 20 > mixed(never)


def test_distortion_changes_colors_and_not_the_order_of_channels() -> None:
    red = Image.fromarray(np.full((8, 8, 3), (200, 40, 40), np.uint8))
    augment = DenseAugment(short=(8,), long=8, distort=True)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    colors = []
    for seed in range(40):
        seed_generators(seed)
        colors.append(augment.train(red, nothing)[0].mean((1, 2)))
    assert all(color.argmax() == 0 for color in colors)
    assert len({tuple(color.tolist()) for color in colors}) > 20


def test_distortion_adds_brightness_and_multiplies_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    gray = Image.fromarray(np.arange(0, 256, 4, np.uint8).reshape(8, 8, 1).repeat(3, 2))
    pixels = np.asarray(gray).astype(int).transpose(2, 0, 1)
    augment, nothing = DenseAugment(short=[8], long=8, hflip=0, distort=True), {"labels": torch.zeros(8, 8)}
    off = {"saturation_factor": None, "hue_factor": None, "channel_permutation": None}
    for shift, factor, before in ((32.0, None, True), (-20.0, 1.5, True), (None, 0.5, False)):
        drawn = {"brightness_factor": shift, "contrast_factor": factor, "contrast_before": before, **off}
        monkeypatch.setattr(Distortion, "make_params", lambda self, inputs, drawn=drawn: drawn)
        wanted = ((pixels + (shift or 0)).clip(0, 255) * (factor or 1)).clip(0, 255)
        found = augment.train(gray, dict(nothing))[0]
        assert torch.allclose(found, torch.from_numpy(wanted).float() / 255, atol=1 / 255)
