"""Accuracy of models, one by one and together, exact over ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.errors import DataError
from .data.labels import IMAGENET_CLASSES, subset_classes
from .data.loaders import EvalLoader

if TYPE_CHECKING:
    from accelerate import Accelerator

ENSEMBLE = "ensemble"


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
    accelerator: Accelerator | None = None,
    ensemble: bool = True,
    subset: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Metrics]:
    """Each model's metrics on `loader`; with more than one and `ensemble`, also of their mean probabilities.

    A model maps images (B, C, H, W) on `device` (the accelerator's where there is one) to logits (B,
    classes), under whatever autocast it opens itself; modules are in eval mode meanwhile. `subset` keeps only
    the logits of an ImageNet variant's classes. Sums stay on the device and are added over ranks at the end;
    call it on all ranks. Targets of several classes (ReaL labels) count as right if any is among the top;
    their loss is against the uniform distribution over them.

    Raises DataError where classes and logits do not fit, or nothing could be evaluated.
    """
    device = accelerator.device if accelerator is not None else torch.device(device)
    classes = None if subset is None else torch.tensor(subset_classes(subset), device=device)
    names = [*models, ENSEMBLE] if ensemble and len(models) > 1 else list(models)
    precision = torch.float32 if device.type == "mps" else torch.float64
    sums = {name: torch.zeros(4, dtype=precision, device=device) for name in names}
    with _eval_mode(models):
        for images, targets, valid in loader:
            images = images.to(device, non_blocking=True)
            targets, valid = targets.to(device, non_blocking=True), valid.to(device, non_blocking=True)
            if classes is not None:
                targets, valid = _within(targets, valid, classes, loader.num_classes)
            log_probabilities = []
            for name, model in models.items():
                logits = _logits(name, model(images), classes, loader.num_classes)
                log_probabilities.append(F.log_softmax(logits.float(), dim=-1))
                sums[name] += _score(log_probabilities[-1], targets, valid, precision)
            if ENSEMBLE in sums and len(models) > 1:
                sums[ENSEMBLE] += _score(_mean(log_probabilities), targets, valid, precision)
    return {name: _metrics(total) for name, total in zip(names, _over_ranks(sums), strict=True)}


def _logits(name: str, logits: Tensor, classes: Tensor | None, num_classes: int) -> Tensor:
    if classes is not None:
        if logits.shape[-1] != IMAGENET_CLASSES:
            raise DataError(f"a subset of ImageNet needs 1000 logits; model {name!r} has {logits.shape[-1]}")
        return logits[:, classes]
    if logits.shape[-1] < num_classes:
        raise DataError(
            f"the data set has {num_classes} classes; model {name!r} has {logits.shape[-1]} logits"
        )
    return logits


def _within(targets: Tensor, valid: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Targets as places in the subset; images of other classes become invalid."""
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
    """Sums over the valid images of: right at top 1, right in the top 5, cross-entropy, one."""
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
    """The log of the mean probability. Raises DataError where the models' classes differ."""
    if len({each.shape[-1] for each in log_probabilities}) > 1:
        raise DataError("models with different numbers of classes have no ensemble; evaluate them one by one")
    return torch.stack(log_probabilities).logsumexp(dim=0) - math.log(len(log_probabilities))


def _over_ranks(sums: Mapping[str, Tensor]) -> list[list[float]]:
    total = torch.stack(list(sums.values()))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    rows: list[list[float]] = total.tolist()
    return rows


def _metrics(total: list[float]) -> Metrics:
    right, among, loss, count = total
    if count == 0:
        raise DataError(
            "no image could be evaluated: the split is empty, or no image has a label of the subset"
        )
    return Metrics(100 * right / count, 100 * among / count, loss / count, round(count))


@contextmanager
def _eval_mode(models: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    modes = [{module: module.training for module in model.modules()} for model in modules]
    try:
        for model in modules:
            model.eval()
        yield
    finally:
        for mode in modes:
            for module, training in mode.items():
                module.training = training


def evaluate_to_table(results: Mapping[str, Metrics]) -> str:
    """The results as a Markdown table."""
    width = max(len("model"), *(len(name) for name in results)) if results else len("model")
    lines = [
        f"| {'model':<{width}} | top-1 % | top-5 % |   loss | images |",
        f"| {'-' * width} | ------: | ------: | -----: | -----: |",
    ]
    for name, metrics in results.items():
        scores = f"{metrics.top1:7.2f} | {metrics.top5:7.2f} | {metrics.loss:6.4f}"
        lines.append(f"| {name:<{width}} | {scores} | {metrics.samples:6d} |")
    return "\n".join(lines)


def to_json(results: Mapping[str, Metrics]) -> str:
    """The results as a JSON object of objects."""
    return json.dumps({name: asdict(metrics) for name, metrics in results.items()}, indent=2)
