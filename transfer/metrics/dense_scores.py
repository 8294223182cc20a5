"""Average precision of boxes and masks as COCO defines it, and mean intersection over union of labeled pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from ...models.dense import DETECTION, IGNORED
from ...models.dense.dense_model import DenseModel
from ...models.errors import ConfigError, DataError, kind_of
from ...models.families import evaluating
from ..config import DataConfig
from ..data.coco import require_coder
from ..data.dense import DenseAugment, DenseBatch, DenseEvalLoader, create_dense_eval_loader
from ..data.dense_sets import check_dense
from ..data.sampler import Ranks
from ..mode_config import DenseConfig

Gather = Callable[[Any], list[Any]]
"""Returns the objects of all ranks, in their order."""
AREAS = ("", "_small", "_medium", "_large")
"""Sizes of objects that are scored: all, below 32 x 32 pixels, below 96 x 96, and above."""


class BoxScores:
    """Average precision of COCO (arXiv:1405.0312) over the images of all ranks, each of which counts once.

    The mean over classes and over thresholds 0.5, 0.55, ..., 0.95 of the intersection over union; 100 boxes an image.
    A prediction on a crowd counts neither for nor against.

    Args:
        categories: Number of classes.
        masks: Whether masks are scored, too.

    Raises:
        DataError: faster-coco-eval is missing.
    """

    def __init__(self, categories: int, masks: bool) -> None:
        require_coder()
        self._categories = categories
        self._kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
        self._images: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[int, int]]] = {}

    def add(self, predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images by their predictions and targets, in pixels of the file.

        Args:
            predictions: `boxes` (N, 4) x, y, x, y, `scores` (N,), `labels` (N,), `masks` (N, H, W).
            targets: The same without scores, with `image_id` and `original_size`; `area` and `iscrowd` (N,) where they
                are known.
        """
        for predicted, target in zip(predictions, targets, strict=True):
            sides = (target["boxes"][:, 2:] - target["boxes"][:, :2]).double()
            crowds = target.get("iscrowd", torch.zeros(len(sides))).int()
            objects = self._rows(target, iscrowd=crowds, area=target.get("area", sides.prod(1)))
            found = self._rows(predicted, score=predicted["scores"])
            self._images[int(target["image_id"])] = objects, found, tuple(target["original_size"])

    def _rows(self, objects: Mapping[str, Any], **more: Tensor) -> list[dict[str, Any]]:
        """Return the objects as COCO's files have them."""
        corners = objects["boxes"].detach().double().cpu()
        boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1)
        columns = {"category_id": objects["labels"], "bbox": boxes, **more}
        values = zip(*(each.tolist() for each in columns.values()), strict=True)
        rows = [dict(zip(columns, each, strict=True)) for each in values]
        if "mask" in self._kinds and rows:
            from faster_coco_eval import mask as coder

            pixels_HWN = objects["masks"].permute(1, 2, 0).to(torch.uint8).cpu().numpy()
            for row, runs in zip(rows, coder.encode(np.asfortranarray(pixels_HWN)), strict=True):
                row.update(segmentation=runs)
        return rows

    def result(self, gather: Gather) -> dict[str, float]:
        """Return `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`, `box_ap_large`, and the same of
        `mask_`. A size that no object has is left out.

        Raises DataError: no image has an object that is no crowd.
        """
        images = {number: image for part in gather(self._images) for number, image in part.items()}
        ordered = [images[number] for number in sorted(images)]  # ties of scores go by this order
        if all(row["iscrowd"] for objects, _, _ in ordered for row in objects):
            raise DataError(
                "no image that was evaluated has an object, so that there is no average precision"
            )
        scores: dict[str, float] = {}
        for name, kind in self._kinds.items():
            scores |= {f"{name}_{key}": value for key, value in self._score(ordered, kind).items()}
        return scores

    def _score(self, images: Sequence[Any], kind: str) -> dict[str, float]:
        from faster_coco_eval import COCO, COCOeval_faster

        objects, found = (self._numbered(images, place, kind) for place in (0, 1))
        sizes = [
            {"id": number, "height": image[2][0], "width": image[2][1]} for number, image in enumerate(images)
        ]
        names = [{"id": label, "name": str(label)} for label in range(self._categories)]
        with redirect_stdout(StringIO()):
            truth = COCO({"images": sizes, "annotations": objects, "categories": names})
            evaluation = COCOeval_faster(truth, truth.loadRes(found), iouType=kind)
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][..., -1]  # thresholds, recalls, classes, sizes; 100 boxes
        parts = {f"ap{area}": precision[..., place] for place, area in enumerate(AREAS)}
        parts |= {"ap50": precision[0, ..., 0], "ap75": precision[5, ..., 0]}
        known = {key: part[part > -1] for key, part in parts.items()}
        return {key: float(part.mean()) for key, part in known.items() if part.size}

    def _numbered(self, images: Sequence[Any], place: int, kind: str) -> list[dict[str, Any]]:
        """Return objects or predictions; the area of a mask is that of its pixels, so it comes without a box."""
        rows = [{**row, "image_id": number} for number, image in enumerate(images) for row in image[place]]
        for number, row in enumerate(rows, 1):
            row.update(id=number)
            row.pop({"segm": "bbox", "bbox": "segmentation"}[kind], None)
        return rows


class MeanIoU:
    """Mean intersection over union and pixel accuracy, from pixels counted over the images of all ranks.

    IoU_c = hits_c / (true_c + predicted_c - hits_c) for the pixels of class c that have a label; the mean is over the
    classes that are there or are predicted. Each image counts once.

    Args:
        num_classes: Number of classes K.
    """

    def __init__(self, num_classes: int) -> None:
        self._classes = num_classes
        self._counts: dict[int, Tensor] = {}  # (3, K) of each image: hits, true, predicted

    def add(self, predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images by the `labels` (H, W) of predictions and targets, where 255 does not count; targets also have
        `image_id`."""
        for predicted, target in zip(predictions, targets, strict=True):
            true = target["labels"]
            labeled = true != IGNORED
            true, found = true[labeled], predicted["labels"].to(true.device)[labeled]
            counted = (true[true == found], true, found)
            counts = torch.stack([torch.bincount(each, minlength=self._classes) for each in counted])
            self._counts[int(target["image_id"])] = counts.cpu()

    def result(self, gather: Gather) -> dict[str, float]:
        """Return `miou` and `pixel_accuracy`. Raises DataError: no pixel has a label."""
        counts = {number: count for part in gather(self._counts) for number, count in part.items()}
        hits, true, found = sum(counts.values(), torch.zeros(3, self._classes, dtype=torch.long))
        if not true.sum():
            raise DataError("no image that was evaluated has a labeled pixel, so that there is no mean IoU")
        union = true + found - hits
        seen = union > 0
        miou = (hits[seen].double() / union[seen]).mean()
        return {"miou": float(miou), "pixel_accuracy": float(hits.sum() / true.sum())}


# What a model finds, scored.


@torch.no_grad()
def score_dense(
    model: DenseModel,
    batches: Iterable[DenseBatch],
    device: torch.device,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    gather: Gather = lambda part: [part],
) -> dict[str, float]:
    """Return average precision, or mean IoU and pixel accuracy, of a model in eval mode on the valid images."""
    scores: BoxScores | MeanIoU = MeanIoU(model.num_classes)
    if model.task == DETECTION:
        scores = BoxScores(model.num_classes, masks=model.design.has_masks)
    for batch in batches:
        rows = batch.valid.nonzero()[:, 0].tolist()
        seen = batch.only(rows or [0]).to(device)  # a sharded model runs on every process
        with autocast():
            prepared = model.prepare(seen.images)
            sizes = [target["original_size"] for target in seen.targets]
            found = model.predict(prepared, model.backbone(prepared.tensors), sizes)
        scores.add(found[: len(rows)], seen.targets[: len(rows)])
    return scores.result(gather)


def evaluate_dense(model: DenseModel, data: str | Path | DataConfig | Iterable[Any]) -> dict[str, float]:
    """Return the scores of a detector or segmenter, where it is, as `graftvit.evaluate`."""
    if isinstance(data, str | Path):
        data = DataConfig(data_path=str(data), dataset=_kind_of(Path(data), model.task))
    batches: Any = loader_for(model, data) if isinstance(data, DataConfig) else _batches(data, model)
    with evaluating(model):
        return score_dense(model, batches, next(model.parameters()).device)


def loader_for(
    model: DenseModel, data: DataConfig, sizes: DenseConfig | None = None, name: str = "the model",
    **ranks: Unpack[Ranks],
) -> DenseEvalLoader:  # fmt: skip
    """Return the images of `data.val_split`, as large as the model or `sizes` says.

    Raises ConfigError: the model does something else. DataError: it has other classes, or as `open_dense`.
    """
    task, names = check_dense(data, (data.val_split,)), model.class_names or None
    if task != model.task:
        raise ConfigError(f"{name} does {model.task}, and data.dataset={data.dataset} is of {task}")
    augment = DenseAugment.to_evaluate(model.sides, sizes)
    masks = model.design.has_masks
    loader = create_dense_eval_loader(data, augment, masks=masks, names=names, **ranks)
    if loader.num_classes != model.num_classes:
        raise DataError(
            f"{data.data_path} has {loader.num_classes} classes, and {name} {model.num_classes}: give the data that it "
            "was trained for"
        )
    return loader


def _kind_of(folder: Path, task: str) -> str:
    """Return the data set that a folder holds, by its folders."""
    return "coco" if task == DETECTION else "cityscapes" if (folder / "leftImg8bit").is_dir() else "ade20k"


def _batches(data: Iterable[Any], model: DenseModel) -> Iterator[DenseBatch]:
    """Return batches of a user, each checked: images, and a target for each, in pixels of its image."""
    seen = 0
    for batch in data:
        if not isinstance(batch, list | tuple) or len(batch) != 2 or len(batch[0]) != len(batch[1]):
            raise DataError(
                f"data holds {kind_of(batch)}, and not pairs: give [(images, targets)], with a target for each image"
            )
        images = list(batch[0])
        if not images:
            continue
        targets = [model.checked(*each) for each in zip(batch[1], images, strict=True)]
        for image, target in zip(images, targets, strict=True):
            target.update(image_id=seen, original_size=tuple(image.shape[-2:]))
            seen += 1
        yield DenseBatch(images, targets, torch.ones(len(images), dtype=torch.bool))
