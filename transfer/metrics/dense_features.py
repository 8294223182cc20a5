"""What the patches of a frozen backbone say of their pixels: nearest neighbors and a linear probe, by mean IoU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

from ...checkpoints.preprocessing import Preprocessing
from ...models.dense import IGNORED
from ...models.dense.backbone import resized
from ...models.dense.dense_model import prepare
from ...models.errors import ConfigError, DataError, UnsupportedModelError
from ..config import DataConfig
from ..data.dense import DenseAugment, DenseBatch, DenseEvalLoader, Target, create_dense_eval_loader
from ..data.dense_sets import check_dense
from ..data.loaders import train_subset
from ..setting import setting
from .dense_scores import MeanIoU
from .distance import NearestNeighbors, fit_probe

PATCHES = 20_000
"""Patches of training images that are kept: as many of each image, drawn at random."""
Classify = Callable[[Tensor], Tensor]


class Squashed(DenseAugment):
    """Resizes images to one size, whatever their ratio."""

    size: tuple[int, int] = setting((224, 224), "height and width")

    def evaluate(self, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        """Return an image (3, H, W) of 0 to 1; its target stays that of the file."""
        pixels = V.to_dtype(V.resize(V.to_image(image), list(self.size)), torch.float32, scale=True)
        return pixels.as_subclass(Tensor), {**target, "labels": target["labels"].long()}


class PatchProbe:
    """Classifiers of the patches of one model, whose weights stay as they are.

    The features of a patch are those of the last map that the model gives, after the last norm where it takes one;
    its class is that of the pixel in its middle. In an image, votes and logits (K, h, w) are resized to the pixels
    (bilinear), and the largest is the class, as in DINOv2's evaluation (arXiv:2304.07193).

    Args:
        model: in eval mode, on the accelerator's device.
        spec: size, mean and deviation of its images, which are resized to this size.
        data: images with a class for each pixel.
        accelerator: of all processes, which get the same numbers.
    """

    def __init__(
        self, model: nn.Module, spec: Preprocessing, data: DataConfig, accelerator: Accelerator
    ) -> None:
        if not hasattr(model, "forward_intermediates"):
            raise UnsupportedModelError(
                f"{type(model).__name__} gives no maps, whose patches could be measured"
            )
        if spec.input_size[0] != 3:
            raise ConfigError(
                f"seg_knn and seg_probe need a model of 3 channels, and this has {spec.input_size[0]}"
            )
        if check_dense(data, (data.train_split, data.val_split)) != "segmentation":
            raise ConfigError(
                f"seg_knn and seg_probe need labeled pixels, and data.dataset={data.dataset} has boxes"
            )
        self._model: Any = model
        self._spec, self._data, self._accelerator = spec, data, accelerator

    def score(self, wanted: Collection[str]) -> dict[str, float]:
        """Return `seg_knn_miou` and `seg_probe_miou` as wanted, and the first also by layer. Raises DataError."""
        split = {"val_split": self._data.train_split, "val_samples": None}
        loader, reference = self._loader(self._data), self._loader(self._data.model_copy(update=split))
        if list(loader.class_names or ()) != list(reference.class_names or ()):
            raise DataError("the classes of the training and of the validation images differ")
        loader.shown, reference.shown = "evaluation", "features of the training images"
        classes = loader.num_classes
        layers = self._features(reference)
        last = len(layers) - 1
        found: dict[str, tuple[int, Classify]] = {}
        if "seg_knn" in wanted:
            neighbors = [NearestNeighbors(*each, classes) for each in layers]
            found["seg_knn_miou"] = last, neighbors[-1]
            found |= {f"seg_knn_miou_layer{place:02d}": (place, each) for place, each in enumerate(neighbors)}
        if "seg_probe" in wanted:
            found["seg_probe_miou"] = last, fit_probe(*layers[-1], classes)
        scores = {name: MeanIoU(classes) for name in found}
        count = 0
        for image, target in self._images(loader):
            maps, count = self._maps(image), count + 1
            for name, (layer, classify) in found.items():
                labels = self._labels(maps[layer], classify, target["original_size"])
                scores[name].add([{"labels": labels}], [target])
        told = {name: each.result(self._gathered)["miou"] for name, each in scores.items()}
        return {**told, "samples": float(sum(self._gathered(count)))}

    def _labels(self, map_CHW: Tensor, classify: Classify, size: tuple[int, int]) -> Tensor:
        height, width = map_CHW.shape[1:]
        votes_NK = classify(map_CHW.flatten(1).T)
        return resized(votes_NK.T.reshape(1, -1, height, width), size)[0].argmax(0)

    def _features(self, reference: DenseEvalLoader) -> list[tuple[Tensor, Tensor]]:
        """Return the features (N, D) and classes (N,) of the drawn patches, by layer, the same on every process."""
        chosen = set(train_subset(self._data, reference.source, labels=False).tolist())
        each = max(1, PATCHES // len(chosen))
        own = {}
        for image, target in self._images(reference):
            if target["image_id"] in chosen:
                random = torch.Generator().manual_seed(target["image_id"])
                own[target["image_id"]] = [
                    _drawn(one, target["labels"], each, random) for one in self._maps(image)
                ]
        images = {number: drawn for part in self._gathered(own) for number, drawn in part.items()}
        if not any(len(labels) for drawn in images.values() for _, labels in drawn):
            raise DataError("no patch of the training images has a label")
        by_layer = zip(*(images[number] for number in sorted(images)), strict=True)
        device = self._accelerator.device
        return [(torch.cat(rows).to(device), torch.cat(labels).to(device))
                for rows, labels in (zip(*layer, strict=True) for layer in by_layer)]  # fmt: skip

    @torch.no_grad()
    def _maps(self, image: Tensor) -> list[Tensor]:
        """Return the maps (C, h, w) of an image, the last one last."""
        prepared = prepare([image.to(self._accelerator.device)], self._spec.mean, self._spec.std, 1)
        with self._accelerator.autocast():
            maps = self._model.forward_intermediates(prepared.tensors, norm=True, intermediates_only=True)
        return [each[0].float() for each in maps]

    def _loader(self, data: DataConfig) -> DenseEvalLoader:
        ranks = {"rank": self._accelerator.process_index, "world_size": self._accelerator.num_processes}
        return create_dense_eval_loader(data, Squashed(size=self._spec.input_size[1:]), **ranks)

    def _images(self, batches: Iterable[Any]) -> Iterable[tuple[Tensor, Target]]:
        batch: DenseBatch
        for batch in batches:
            rows = zip(batch.images, batch.targets, batch.valid.tolist(), strict=True)
            yield from ((image, target) for image, target, valid in rows if valid)

    def _gathered(self, part: Any) -> list[Any]:
        return gather_object([part])


def _drawn(map_CHW: Tensor, labels_HW: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return features (N, C) and classes (N,) of at most so many patches that have a class."""
    middle = F.interpolate(labels_HW[None, None].float(), size=map_CHW.shape[1:], mode="nearest-exact")
    labels_N = middle.flatten().long()
    labeled = (labels_N != IGNORED).nonzero()[:, 0]
    rows = labeled[torch.randperm(len(labeled), generator=random)[:count]]
    return map_CHW.flatten(1).T.cpu()[rows], labels_N[rows]
