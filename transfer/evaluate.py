"""Accuracy of models, each alone and as an ensemble, exact over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.errors import DataError
from ..models.families import evaluating
from .data.labels import IMAGENET_CLASSES, find_subset, subset_classes
from .data.loaders import EvalLoader
from .metrics.ranks import exact, summed

if TYPE_CHECKING:
    from accelerate import Accelerator

ENSEMBLE = "ensemble"
SUBSET_CLASSES = 200
"""The number of classes of ImageNet-A and of ImageNet-R."""


@dataclass(frozen=True)
class Metrics:
    """`top1` and `top5` in percent (of all classes, if fewer than 5), mean cross-entropy, images."""

    top1: float
    top5: float
    loss: float
    samples: int


@torch.no_grad()
def evaluate(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    loader: EvalLoader,
    *,
    others: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    accelerator: Accelerator | None = None,
    ensemble: bool = True,
    subset: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Metrics]:
    """Return each model's metrics on `loader`; with several models and `ensemble`, also of their mean probabilities.

    A model maps images (B, C, H, W) on `device` (default: the accelerator's) to logits (B, classes), under its own
    autocast; modules are put into eval mode. `subset` keeps only the logits of an ImageNet variant's classes. `others`
    are measured in the same way, but are not part of the ensemble. Sums stay on the device and are added over ranks at
    the end; call it on all ranks. Targets of several classes (ReaL labels) are correct if any of them is among the top;
    their loss is against the uniform distribution over them.

    Raises DataError: classes and logits do not fit, or no image could be evaluated.
    """
    device = accelerator.device if accelerator is not None else torch.device(device)
    classes = None if subset is None else torch.tensor(subset_classes(subset), device=device)
    names = [*models, ENSEMBLE] if ensemble and len(models) > 1 else list(models)
    precision = exact(device)
    every = {**models, **(others or {})}
    sums = {name: torch.zeros(4, dtype=precision, device=device) for name in [*names, *(others or ())]}
    with evaluating(*(model for model in every.values() if isinstance(model, nn.Module))):
        for images, targets, valid in loader:
            images = images.to(device, non_blocking=True)
            targets, valid = targets.to(device, non_blocking=True), valid.to(device, non_blocking=True)
            if classes is not None:
                targets, valid = _within(targets, valid, classes, _numbered(loader))
            log_probabilities = []
            for name, model in every.items():
                logits = model(images)
                check_classes(name, logits.shape[-1], loader, subset)
                logits = logits if classes is None else logits[:, classes]
                log_probabilities.append(F.log_softmax(logits.float(), dim=-1))
                sums[name] += _score(log_probabilities[-1], targets, valid, precision)
            if ENSEMBLE in sums and len(models) > 1:
                sums[ENSEMBLE] += _score(_mean(log_probabilities[: len(models)]), targets, valid, precision)
    totals: list[list[float]] = summed(torch.stack(list(sums.values()))).tolist()
    return {name: _metrics(total) for name, total in zip(sums, totals, strict=True)}


def check_classes(name: str, logits: int, loader: EvalLoader, subset: str | None = None) -> None:
    """Raise DataError if a model's logits are not the classes of the data set, or of ImageNet with a `subset`.

    With more logits than classes, labels would mean other classes than the model's, and the accuracy would look
    plausible but be wrong.
    """
    if subset is not None:
        if logits != IMAGENET_CLASSES:
            raise DataError(f"a subset of ImageNet needs 1000 logits; model {name!r} has {logits}")
        return
    if logits != loader.num_classes:
        raise DataError(_misfit(name, logits, loader))


def check_folders(name: str, logits: int, loader: EvalLoader) -> None:
    """Raise DataError for 1,000 logits and the 200 folders of an ImageNet variant, whatever number of classes is given.

    A model that was trained on these folders may have more logits than folders.
    """
    if logits == IMAGENET_CLASSES and find_subset(loader.class_names) is not None:
        raise DataError(_misfit(name, logits, loader))


def _misfit(name: str, logits: int, loader: EvalLoader) -> str:
    classes = _numbered(loader)
    fitting = find_subset(loader.class_names) if logits == IMAGENET_CLASSES else None
    advice = "evaluate the model on the classes that it was trained for, or its features with --metrics knn"
    if fitting is not None:
        advice = f"its folders are those of {fitting}, so add --subset {fitting}"
    elif logits == IMAGENET_CLASSES and classes == SUBSET_CLASSES:
        advice = "add --subset imagenet-a or --subset imagenet-r if it is one of these"
    elif loader.class_names is None and logits > classes:
        advice = f"set --num_classes {logits} if its labels are numbered as the model's classes are"
    return f"the data set has {classes} classes; model {name!r} has {logits} logits: {advice}"


def _numbered(loader: EvalLoader) -> int:
    """Return the number of classes of the labels: the number of folders if known, whatever number is given."""
    return len(loader.class_names or ()) or loader.num_classes


def _within(targets: Tensor, valid: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the targets as positions in the subset; images of other classes become invalid."""
    if targets.ndim == 2:
        kept = targets[:, classes]
        return kept, valid & kept.any(dim=1)
    if num_classes == len(classes):
        return targets, valid
    if num_classes != IMAGENET_CLASSES:
        raise DataError(
            f"the data set has {num_classes} classes; a subset of ImageNet has {len(classes)} (or all 1000)"
        )
    places = torch.searchsorted(classes, targets).clamp(max=len(classes) - 1)
    return places, valid & (classes[places] == targets)


def _score(log_probabilities: Tensor, targets: Tensor, valid: Tensor, precision: torch.dtype) -> Tensor:
    """Return sums over the valid images: correct in top 1, correct in top 5, cross-entropy, count."""
    top = log_probabilities.topk(min(5, log_probabilities.shape[-1]), dim=-1).indices
    if targets.ndim == 2:
        width = log_probabilities.shape[-1]
        targets = F.pad(targets, (0, width - targets.shape[-1]))
        right = targets.gather(1, top) > 0
        shares = targets / targets.sum(dim=1, keepdim=True).clamp(min=1)
        loss = -(shares * log_probabilities).sum(dim=1)
    else:
        right = top == targets[:, None]
        loss = -log_probabilities.gather(1, targets[:, None])[:, 0]
    rows = torch.stack([right[:, 0], right.any(dim=1), loss, torch.ones_like(loss)], dim=1).to(precision)
    return torch.where(valid[:, None], rows, torch.zeros_like(rows)).sum(dim=0)


def _mean(log_probabilities: list[Tensor]) -> Tensor:
    """Return the log of the mean probability."""
    return torch.stack(log_probabilities).logsumexp(dim=0) - math.log(len(log_probabilities))


def _metrics(total: list[float]) -> Metrics:
    right, among, loss, count = total
    if count == 0:
        raise DataError(
            "no image could be evaluated: the split is empty, or none of its images can be read, as the log says, or "
            "none has a label of the subset"
        )
    return Metrics(100 * right / count, 100 * among / count, loss / count, round(count))
