from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from graftvit.models.errors import DataError
from graftvit.transfer.metrics.dense_scores import BoxScores, MeanIoU

CLASSES = 3
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""Of pycocotools, in its order."""
Pair = tuple[dict[str, Any], dict[str, Any]]


def alone(value: Any) -> list[Any]:
    return [value]


def random_pairs(seed: int, images: int = 6) -> list[Pair]:
    """Predictions and targets: moved objects, missing and invented ones, crowds, images without either."""
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(images):
        height, width = (int(side) for side in random.integers(40, 200, 2))
        objects = int(random.integers(0, 6))
        boxes = _boxes(random, objects, height, width)
        moved = boxes + random.normal(0, 3, boxes.shape) * random.integers(0, 2, (objects, 1))
        labels = random.integers(0, CLASSES, objects)
        kept = random.random(objects) < 0.8
        invented = _boxes(random, int(random.integers(0, 4)), height, width)
        found = np.concatenate((moved[kept], invented))
        kinds = np.concatenate((labels[kept], random.integers(0, CLASSES, len(invented))))
        # few distinct scores, so that there are ties
        scores = random.integers(1, 8, len(found)) / 8
        target = {
            **_as_tensors(boxes, labels, height, width),
            "iscrowd": torch.from_numpy(random.random(objects) < 0.2),
            "image_id": 7 * number + 3,
            "original_size": (height, width),
        }
        predicted = {**_as_tensors(found, kinds, height, width), "scores": torch.from_numpy(scores).float()}
        pairs.append((predicted, target))
    return pairs


def _boxes(random: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    corners = random.random((count, 2)) * (width * 0.8, height * 0.8)
    sides = 2 + random.random((count, 2)) * (width, height)
    return np.concatenate((corners, np.minimum(corners + sides, (width, height))), axis=1)


def _as_tensors(boxes: np.ndarray, labels: np.ndarray, height: int, width: int) -> dict[str, Any]:
    y, x = np.mgrid[:height, :width]
    masks = [
        ((x - (x0 + x1) / 2) / (x1 - x0 + 1)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0 + 1)) ** 2 < 0.2
        for x0, y0, x1, y1 in boxes
    ]
    return {
        "boxes": torch.from_numpy(boxes).float(),
        "labels": torch.from_numpy(labels),
        "masks": torch.from_numpy(np.array(masks, bool).reshape(-1, height, width)),
    }


def scored(pairs: Sequence[Pair], masks: bool = True) -> dict[str, float]:
    scores = BoxScores(CLASSES, masks)
    for predicted, target in pairs:
        scores.add([predicted], [target])
    return scores.result(alone)


def published(pairs: Sequence[Pair], kind: str) -> dict[str, float]:
    """What pycocotools says, fed by its own files."""
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(part: int) -> list[dict[str, Any]]:
        found = []
        for pair in pairs:
            objects = pair[part]
            for place, (x0, y0, x1, y1) in enumerate(objects["boxes"].double().tolist()):
                runs = coder.encode(np.asfortranarray(objects["masks"][place].numpy().astype(np.uint8)))
                row = {
                    "image_id": pair[1]["image_id"], "category_id": 5 * int(objects["labels"][place]) + 2,
                    "id": len(found) + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                    "segmentation": {**runs, "counts": runs["counts"].decode()},
                }  # fmt: skip
                own = (
                    {"iscrowd": int(objects["iscrowd"][place])}
                    if part
                    else {"score": float(objects["scores"][place])}
                )
                found.append(row | own)
        return found

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [
                {"id": target["image_id"], "height": target["original_size"][0], "width": target["original_size"][1]}
                for _, target in pairs
            ],
            "annotations": rows(1),
            "categories": [{"id": 5 * label + 2, "name": str(label)} for label in range(CLASSES)],
        }  # fmt: skip
        truth.createIndex()
        found = rows(0)
        if kind == "segm":  # else the area of a prediction is that of its box
            found = [{key: value for key, value in row.items() if key != "bbox"} for row in found]
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: value for name, value in zip(NAMES, evaluation.stats, strict=False) if value > -1}


def check_against_published(seed: int) -> None:
    pairs = random_pairs(seed)
    if not sum(len(predicted["boxes"]) for predicted, _ in pairs) or all(
        target["iscrowd"].all() for _, target in pairs
    ):
        return
    found = scored(pairs)
    expected = {
        f"{name}_{key}": value
        for name, kind in (("box", "bbox"), ("mask", "segm"))
        for key, value in published(pairs, kind).items()
    }
    assert found == pytest.approx(expected, abs=1e-9)


def test_scores_are_those_of_pycocotools() -> None:
    for seed in range(12):
        check_against_published(seed)


@pytest.mark.slow
def test_scores_are_those_of_pycocotools_on_many_sets() -> None:
    for seed in range(12, 212):
        check_against_published(seed)


def test_no_prediction_scores_zero() -> None:
    pairs = [(_without(predicted), target) for predicted, target in random_pairs(1)]
    found = scored(pairs)
    assert found["box_ap"] == found["mask_ap"] == 0


def test_an_image_without_objects_only_counts_by_what_is_found_there() -> None:
    targets = [target for _, target in random_pairs(2)]
    for target in targets:
        target["iscrowd"][:] = False
    perfect = [
        ({**target, "scores": torch.full((len(target["labels"]),), 0.5)}, target) for target in targets
    ]
    assert scored(perfect)["box_ap"] == pytest.approx(1)
    full = max(targets, key=lambda target: len(target["labels"]))
    empty = {**full, **_without(full), "iscrowd": torch.zeros(0), "image_id": 999}
    nothing = {**_without(full), "scores": torch.zeros(0)}
    assert scored([*perfect, (nothing, empty)])["box_ap"] == pytest.approx(1)
    sure = {**full, "scores": torch.ones(len(full["labels"]))}
    assert scored([*perfect, (sure, empty)])["box_ap"] < 0.95


def _without(objects: dict[str, Any]) -> dict[str, Any]:
    return {key: objects[key][:0] for key in ("boxes", "labels", "masks", "scores") if key in objects}


def test_no_object_is_one_sentence() -> None:
    pairs = [
        (predicted, {**target, **_without(target), "iscrowd": torch.zeros(0)})
        for predicted, target in random_pairs(3)
    ]
    with pytest.raises(DataError, match="no image that was evaluated has an object"):
        scored(pairs)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="faster-coco-eval"):
        BoxScores(3, masks=False)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_agree_with_one_and_an_image_counts_once(ranks: int) -> None:
    pairs = random_pairs(4, images=7)
    padded = pairs + pairs[: -len(pairs) % ranks]
    parts = [BoxScores(CLASSES, masks=True) for _ in range(ranks)]
    for number, (predicted, target) in enumerate(padded):
        parts[number % ranks].add([predicted], [target])
    gathered = [part._images for part in parts]
    assert [part.result(lambda _: gathered) for part in parts] == [scored(pairs)] * ranks


# Labeled pixels.


def random_maps(seed: int, images: int = 5, classes: int = 4) -> list[Pair]:
    random = np.random.default_rng(seed)
    maps = []
    for number in range(images):
        shape = tuple(random.integers(5, 30, 2))
        true = random.integers(0, classes - 1, shape)  # the last class is only predicted
        true[random.random(shape) < 0.2] = 255
        found = np.where(
            random.random(shape) < 0.5, np.minimum(true, classes - 1), random.integers(0, classes, shape)
        )
        maps.append(
            ({"labels": torch.from_numpy(found)}, {"labels": torch.from_numpy(true), "image_id": number})
        )
    return maps


def naive(maps: Sequence[Pair], classes: int) -> tuple[float, float]:
    true = np.concatenate([target["labels"].numpy().ravel() for _, target in maps])
    found = np.concatenate([predicted["labels"].numpy().ravel() for predicted, _ in maps])
    true, found = true[true != 255], found[true != 255]
    shares = []
    for label in range(classes):
        either = ((true == label) | (found == label)).sum()
        if either:
            shares.append(((true == label) & (found == label)).sum() / either)
    return float(np.mean(shares)), float((true == found).mean())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("classes", [4, 6])
def test_mean_iou_is_a_naive_count_on_any_number_of_ranks(ranks: int, classes: int) -> None:
    maps = random_maps(ranks)
    parts = [MeanIoU(classes) for _ in range(ranks)]
    for number, (predicted, target) in enumerate([*maps, maps[0]]):
        parts[number % ranks].add([predicted], [target])
    found = parts[-1].result(lambda _: [part._counts for part in parts])
    miou, accuracy = naive(maps, classes)
    assert found == pytest.approx({"miou": miou, "pixel_accuracy": accuracy}, rel=1e-6)


def test_no_labeled_pixel_is_one_sentence() -> None:
    nothing = torch.full((4, 4), 255)
    scores = MeanIoU(3)
    scores.add([{"labels": torch.zeros(4, 4, dtype=torch.long)}], [{"labels": nothing, "image_id": 0}])
    with pytest.raises(DataError, match="labeled pixel"):
        scores.result(alone)


# Real processes.


def _score_in_a_process(rank: int, ranks: int, file: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=ranks)

    def gather(value: Any) -> list[Any]:
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, value)
        return parts

    boxes, maps = BoxScores(CLASSES, masks=True), MeanIoU(4)
    for predicted, target in random_pairs(5)[rank::ranks]:
        boxes.add([predicted], [target])
    for predicted, target in random_maps(5)[rank::ranks]:
        maps.add([predicted], [target])
    found = {**boxes.result(gather), **maps.result(gather)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    given = 2, str(tmp_path / "group"), str(tmp_path)
    mp.start_processes(_score_in_a_process, given, nprocs=2, start_method="fork")
    one = MeanIoU(4)
    for predicted, target in random_maps(5):
        one.add([predicted], [target])
    expected = {**scored(random_pairs(5)), **one.result(alone)}
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


@pytest.mark.slow
def test_importing_the_scores_imports_no_scorer() -> None:
    text = "import sys, graftvit.transfer.metrics.dense_scores; assert 'faster_coco_eval' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
