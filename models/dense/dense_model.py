"""A detector or segmenter on a timm model: images of several sizes in, losses or predictions out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from ..errors import ConfigError, DataError, JsonDict, check_types, did_you_mean, kind_of
from . import DESIGNS, DETECTION, IGNORED, SEGMENTATION, Design, Kind, detectors, segmenters
from .backbone import Backbone, Levels, Maps, Prepared, Pyramid, SimplePyramid, divisor_of
from .detectors import Sizes


def _head_of(kind: Kind) -> Callable[..., nn.Module]:
    return vars(detectors if DESIGNS[kind].task == DETECTION else segmenters)[DESIGNS[kind].head]


def _settings(kind: Kind) -> list[str]:
    """Return the settings of a head, besides its levels, width and classes."""
    return list(signature(_head_of(kind)).parameters)[3:]


class DenseModel(nn.Module):
    """A backbone, a neck and a head that detects objects or classifies pixels; made by `create_dense`.

    In training mode it returns losses, in evaluation mode predictions. Images are tensors (3, H, W) of values 0..1 (or
    uint8) of any size. A target of detection has `boxes` (N, 4) as (x1, y1, x2, y2), `labels` (N,) from 0, and `masks`
    (N, H, W) for Mask R-CNN; one of segmentation has `labels` (H, W), where 255 is not counted.
    """

    def __init__(
        self, kind: Kind, backbone: Backbone, neck: nn.Module, head: nn.Module, settings: JsonDict
    ) -> None:
        super().__init__()
        self.kind, self.design, self.task = kind, DESIGNS[kind], DESIGNS[kind].task
        self.backbone, self.neck, self.head = backbone, neck, head
        self.settings = settings
        """The arguments of `create_dense` except the body; JSON."""
        self.num_classes: int = settings["num_classes"]
        self.class_names: tuple[str, ...] = tuple(settings["class_names"])
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        self.size_divisor: int = settings["size_divisor"]
        self.sides: tuple[int, int] = (settings["short"], settings["long"])
        """The shorter and the longer side, at most, of an image to evaluate."""

    def to_model(self) -> nn.Module:
        """Return the model inside, which a `DualViT` teaches, and of which maps are shown."""
        return self.backbone.body

    def on(self, body: nn.Module) -> DenseModel:
        """Return a copy that stands on another model with the same maps, as on a converted one."""
        return copy.deepcopy(self, {id(self.backbone.body): body})

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None = None
    ) -> Prepared:
        """Return one batch of images and targets, as `prepare`, with labels padded by 255.

        Raises DataError: there is no image, or not one target for each that fits it.
        """
        if targets is not None and len(targets) != len(images):
            raise DataError(f"{len(images)} images are given, and {len(targets)} targets")
        made = prepare(images, self.mean, self.std, self.size_divisor, next(self.parameters()).dtype)
        if targets is None:
            return made
        known = [self.checked(*each) for each in zip(targets, images, strict=True)]
        if self.task == SEGMENTATION:
            height, width = made.tensors.shape[2:]
            for each in known:
                each["labels"] = _padded(each["labels"].long(), height, width, IGNORED)
        elif any(not ((each["boxes"][:, 2:] - each["boxes"][:, :2]) > 0).all() for each in known):
            raise DataError(
                "a target has an empty box, which teaches nothing: leave it out; boxes are x1, y1, x2, y2"
            )
        return replace(made, targets=known)

    def checked(self, target: Mapping[str, Any], image: Tensor) -> JsonDict:
        """Return a copy of the target of an image. Raises DataError: it lacks something, or does not fit."""
        detects, size = self.task == DETECTION, tuple(image.shape[-2:])
        wanted = [*(["boxes"] if detects else []), "labels", *(["masks"] if self.design.has_masks else [])]
        missing = [name for name in wanted if name not in target] if isinstance(target, Mapping) else wanted
        if missing:
            raise DataError(f"a target has no {missing[0]!r}: that of a {self.kind} has {', '.join(wanted)}")
        labels = target["labels"]
        count = len(labels)
        shapes = {"boxes": (count, 4), "labels": (count,) if detects else size, "masks": (count, *size)}
        for name in wanted:
            found = tuple(getattr(target[name], "shape", ()))
            if found != shapes[name]:
                raise DataError(f"{name} of a target have the shape {found}, and not {shapes[name]}")
        if labels.is_floating_point() and labels.numel():
            raise DataError(f"labels of a target are {labels.dtype}, and not whole numbers")
        counted = labels if detects else labels[labels != IGNORED].cpu()
        if counted.numel() and not 0 <= counted.min() <= counted.max() < self.num_classes:
            raise DataError(
                f"labels are from {counted.min()} to {counted.max()}, and the model's classes from 0 to "
                f"{self.num_classes - 1}"
            )
        return dict(target) | ({"labels": labels.long()} if detects else {})

    def losses(self, prepared: Prepared, maps: Maps) -> dict[str, Tensor]:
        """Return the losses by name, scalars, of a batch with targets and its maps of the backbone."""
        head: Any = self.head
        return head.losses(prepared, self.neck(maps))

    def predict(
        self, prepared: Prepared, maps: Maps, original_sizes: Sizes, *, logits: bool = False
    ) -> list[JsonDict]:
        """Return what is found in each image, at its original size (height, width).

        Detection: `boxes` (N, 4), `scores` (N,), `labels` (N,), and `masks` (N, H, W) of Mask R-CNN. Segmentation:
        `labels` (H, W), and with `logits` also those, (K, H, W).
        """
        head: Any = self.head
        how = {"logits": logits} if self.task == SEGMENTATION else {}
        return head.predict(prepared, self.neck(maps), original_sizes, **how)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None = None) -> Any:
        """Return the losses of images with targets in training mode, else the predictions at the images' sizes.

        Raises DataError: as `prepare`, or there are no targets in training mode.
        """
        if self.training and targets is None:
            raise DataError("a model in training mode needs targets: give them, or call eval() first")
        prepared = self.prepare(images, targets if self.training else None)
        maps = self.backbone(prepared.tensors)
        return self.losses(prepared, maps) if self.training else self.predict(prepared, maps, prepared.sizes)


def prepare(
    images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], divisor: int,
    dtype: torch.dtype = torch.float32,
) -> Prepared:  # fmt: skip
    """Return one batch of images (3, H, W): (image - mean) / std, padded below and on the right with zeros.

    The sides are the smallest multiples of `divisor` that all images fit into.

    Raises DataError: there is no image, or one has another shape.
    """
    if not len(images):
        raise DataError("images holds no image")
    for each in images:
        if not isinstance(each, Tensor) or each.ndim != 3 or len(each) != 3 or not each.numel():
            found = tuple(each.shape) if isinstance(each, Tensor) else kind_of(each)
            raise DataError(f"images holds {found}: give a tensor (3, H, W) for each image")
    sizes = [(int(each.shape[-2]), int(each.shape[-1])) for each in images]
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))
    center, scale = (
        torch.tensor(each, dtype=dtype, device=images[0].device)[:, None, None] for each in (mean, std)
    )
    normalized = [(to_dtype(each, dtype, scale=True) - center) / scale for each in images]
    return Prepared(torch.stack([_padded(each, height, width) for each in normalized]), sizes)


def _padded(tensor: Tensor, height: int, width: int, value: float = 0) -> Tensor:
    return F.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=value)


RANGES: dict[str, tuple[float, float]] = {
    "num_classes": (1, 1_000_000), "width": (2, 1_000_000), "size_divisor": (1, 10_000), "short": (1, 100_000),
    "long": (1, 100_000), "anchor_scale": (1e-3, 1e3), "score_threshold": (0, 1), "detections": (1, 1_000_000),
    "samples": (1, 1_000_000),
    "dropout": (0, 0.999),
}  # fmt: skip


def _check_ranges(kind: Kind, given: Mapping[str, float]) -> None:
    valid = ("num_classes", "width", "size_divisor", "short", "long", *_settings(kind))
    for name, value in given.items():
        if name not in valid:
            raise ConfigError(f"{kind} has no setting {name!r}; {did_you_mean(name, valid)}")
        low, high = RANGES[name]
        if not low <= value <= high:
            raise ConfigError(f"{name}={value}; give a number from {low:,} to {high:,}")


def _by_channel(name: str, values: Sequence[float], low: float) -> list[float]:
    if len(values) != 3 or not all(low <= each <= 1e6 for each in values):
        raise ConfigError(f"{name}={list(values)}; give three numbers from {low:g} to 1e6")
    return list(values)


@check_types()
def create_dense(
    kind: Kind, body: nn.Module, num_classes: int, *, width: int | None = None, norms: Sequence[int] = (),
    class_names: Sequence[str] = (), mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    size_divisor: int | None = None, short: int = 800, long: int = 1333, anchor_scale: float | None = None,
    score_threshold: float | None = None, detections: int | None = None, samples: int | None = None,
    dropout: float | None = None,
) -> DenseModel:  # fmt: skip
    """Return a detector or segmenter with a fresh neck and head on a timm model, whose weights are kept.

    Args:
        kind: a name in `models.dense.DESIGNS`, as `dense.head`.
        body: a pyramid or a plain vision transformer, of timm or converted, for images of any size
            (`any_size_arguments`); its classifier and last norm are removed.
        num_classes: without background.
        width: of the levels; 256, and 512 of UPerNet.
        norms: the outputs of the backbone, from 0, that go through a new LayerNorm.
        class_names: in the order of the labels, where they are known.
        mean: of each channel of images 0..1; that of the weights of `body`, or ImageNet's.
        std: as `mean`.
        size_divisor: images are padded to multiples of it; the largest stride.
        short: the shorter side of an image of a file when it is evaluated or shown.
        long: at most the longer one.
        anchor_scale: of RetinaNet and Mask R-CNN, the smallest anchor in strides; 4, and 8 of Mask R-CNN.
        score_threshold: of detection, the least score of a box; .05.
        detections: of detection, the most boxes of an image; 100.
        samples: of Mask R-CNN, the proposals that teach an image; 512.
        dropout: of segmentation, the part of the channels that is dropped before the classifier; .1.

    Raises:
        UnsupportedModelError: `body` gives no maps, or takes images of one size alone.
        ConfigError: an unknown kind or setting, or one that does not fit.
    """
    given: JsonDict = {name: each for name, each in locals().items() if name in RANGES and each is not None}
    _check_ranges(kind, given)
    if class_names and len(class_names) != num_classes:
        raise ConfigError(f"{len(class_names)} class names are given for num_classes={num_classes}")
    design, described = DESIGNS[kind], getattr(body, "pretrained_cfg", None) or {}
    head = {name: given[name] for name in _settings(kind) if name in given}
    width = width or design.width
    backbone, divisor = Backbone(body, norms), divisor_of(body)
    if size_divisor is not None and size_divisor % divisor:
        raise ConfigError(f"size_divisor={size_divisor}; give a multiple of {divisor}, the largest stride")
    settings = given | {
        "width": width,
        "norms": sorted(set(norms)),
        "class_names": list(class_names),
        "mean": _by_channel("mean", mean or described.get("mean") or IMAGENET_DEFAULT_MEAN, -1e6),
        "std": _by_channel("std", std or described.get("std") or IMAGENET_DEFAULT_STD, 1e-6),
        "size_divisor": size_divisor or divisor,
    }
    levels, neck = _neck(design, backbone, width)
    made = _head_of(kind)(levels, width, num_classes, **head)
    return DenseModel(kind, backbone, neck, made, settings)


def _neck(design: Design, backbone: Backbone, width: int) -> tuple[Levels, nn.Module]:
    """Return what the head gets, and what makes it from the maps."""
    is_plain = len(backbone.channels) == 1
    if not design.has_neck and not is_plain:
        return Levels(backbone.channels, backbone.strides), nn.Identity()
    neck = (SimplePyramid if is_plain else Pyramid)(backbone, width, design.finest, design.extra)
    return neck.levels, neck
