"""Everything that is measured of models on a split: accuracy, nearest neighbors, a linear probe, distances."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.pretrained import describe
from ...checkpoints.provenance import Pretrained
from ...models.errors import ConfigError, DataError, UnsupportedModelError, check_types, kind_of
from ...models.families import any_family, check_size, evaluating
from ...models.given import HoldsModel, Model, as_model, check_images, computes_with
from ..config import DataConfig
from ..data.augment import with_settings
from ..data.labels import IMAGENET_CLASSES, find_subset, subset_classes
from ..data.loaders import EvalLoader, create_eval_loader
from .distance import (
    ComparedLayers,
    Distance,
    Distances,
    NearestNeighbors,
    Reader,
    exact,
    fit_probe,
    gathered,
    measure_distances,
    summed,
)
from .intervals import Interval, intervals_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...models.dense.dense_model import DenseModel


# Accuracy of models, each alone and as an ensemble, exact over ranks.

ENSEMBLE = "ensemble"
Batches: TypeAlias = Iterable[Sequence[Tensor]]
"""Batches of images (B, C, H, W), normalized for the model, and of labels (B,), whole numbers from 0."""
DenseBatches: TypeAlias = Iterable[tuple[Sequence[Tensor], Sequence[Mapping[str, Any]]]]
"""Batches of images (3, H, W) of 0 to 1, each of its size, and of their targets."""
SUBSET_CLASSES = 200
"""The number of classes of ImageNet-A and of ImageNet-R."""


@dataclass(frozen=True)
class Metrics:
    """`top1` and `top5` in percent (of all classes, if fewer than 5), mean cross-entropy, images."""

    top1: float
    top5: float
    loss: float
    samples: int


@overload
def evaluate(
    models: Mapping[str, Model | Pretrained], data: str | Path | DataConfig | Batches
) -> dict[str, Metrics]: ...


@overload
def evaluate(  # type: ignore[overload-overlap]
    models: DenseModel, data: str | Path | DataConfig | DenseBatches
) -> dict[str, float]: ...


@overload
def evaluate(models: Model | Pretrained, data: str | Path | DataConfig | Batches) -> Metrics: ...


@check_types()
def evaluate(
    models: Model | Pretrained | Mapping[str, Model | Pretrained],
    data: str | Path | DataConfig | Batches | DenseBatches,
) -> Metrics | dict[str, Metrics] | dict[str, float]:
    """Return the accuracy and the mean cross-entropy of a model, or of several by name, where they are.

    Of a detector or segmenter, given or named, it returns the numbers of `graftvit evaluate`: `box_ap`, `mask_ap`,
    `miou` and so on, of images as large as its run evaluated them.

    Args:
        models: one as of `graftvit.save`, or several by name. A `DualViT` predicts with its student.
        data: the folder of a data set, or its `DataConfig`: each model sees the validation split as its own
            preprocessing and the settings make it, and a class has the number that it has among the names of the
            model's classes, if they are known. Or batches of images, normalized for all of the models, and labels; for
            a detector or segmenter, of images and targets as `DenseModel` takes them.

    Raises:
        DataError: the model has other classes than the labels, cannot take the images, or no image is given.
        UnsupportedModelError, CheckpointError: as `graftvit.as_model`.
    """
    if not isinstance(models, Mapping):
        return _evaluate({"model": models}, data)["model"]
    return _evaluate(models, data)


def _evaluate(models: Mapping[str, Model | Pretrained], data: Any) -> dict[str, Any]:
    from ...checkpoints.dense_models import dense_of  # here: a run of a classifier needs no torchvision

    dense = {name: dense_of(each) for name, each in models.items()}
    if any(each is not None for each in dense.values()):
        return _score_dense(dense, data)
    if not models:
        raise ConfigError("models={} names no model: give one, or several by name")
    if isinstance(data, str | Path):
        data = DataConfig(data_path=str(data))
    if isinstance(data, DataConfig):
        return {name: _on_split(name, each, data) for name, each in models.items()}
    if len(models) > 1 and all(isinstance(each, Tensor) for each in models.values()):
        raise ConfigError("models is a state dict: load it into a model, and give that")
    named = {name: _opened(name, each) for name, each in models.items()}
    device = _device_of(next(iter(named.values())))
    with evaluating(*named.values()):
        predicting = {name: _predicting(name, each) for name, each in named.items()}
        return score_models(predicting, _Batches(data, named), ensemble=False, device=device)


def _score_dense(models: Mapping[str, DenseModel | None], data: Any) -> dict[str, dict[str, float]]:
    from .dense_scores import evaluate_dense  # here: it reads data of detection

    found = {name: model for name, model in models.items() if model is not None}
    other = next((name for name in models if name not in found), None)
    if other is not None:
        raise ConfigError(
            f"{other} is no detector or segmenter, and another model is: evaluate them one by one"
        )
    return {name: evaluate_dense(model, data) for name, model in found.items()}


def _is_dual(thing: object) -> TypeGuard[nn.Module]:
    """Return whether it is a `DualViT`, which predicts by itself: its student may need its teacher."""
    return isinstance(thing, nn.Module) and isinstance(thing, HoldsModel)


def _opened(name: str, thing: Model | Pretrained) -> nn.Module:
    return thing if _is_dual(thing) else as_model(thing, name)


def _predicting(name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the logits of a model as a function of images. It raises a GraftError for a model that gives none."""
    predict: Callable[[Tensor], Any] = model.predict if _is_dual(model) else model  # type: ignore[assignment]
    student = _student_of(model)
    if getattr(student, "num_classes", None) == 0:
        raise DataError(f"{name} has no classes to measure: give a model with a head")
    weight = next((each for each in student.parameters() if each.is_floating_point()), None)

    def predicting(images: Tensor) -> Tensor:
        fits = weight is None or computes_with(images, weight)
        try:
            out = predict(images if weight is None or fits else images.to(weight.dtype))
        except (RuntimeError, TypeError) as error:
            if any_family(student) is not None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(f"{name} is a {type(student).__name__} and fails: {error}") from error
        logits = getattr(out, "logits", out)  # as of transformers' models
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise UnsupportedModelError(f"{name} gives {kind_of(out)} and no logits (B, classes)")
        if torch.isnan(logits).any():
            raise DataError(f"{name} gives values that are not finite")
        return logits

    return predicting


def _student_of(model: nn.Module) -> nn.Module:
    return model.student if _is_dual(model) else model  # type: ignore[return-value]


def _device_of(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _on_split(name: str, thing: Model | Pretrained, config: DataConfig) -> Metrics:
    known = describe(thing, name)
    model = thing if _is_dual(thing) else known.model
    loader = create_eval_loader(config, with_settings(known.preprocessing, config), names=known.label_names)
    with evaluating(model):
        return score_models({name: _predicting(name, model)}, loader, device=_device_of(model))[name]


class _Batches:
    """Batches of a user, each checked: images that fit the models, and labels of their classes."""

    class_names = None
    num_classes = 0

    def __init__(self, batches: Batches, models: Mapping[str, nn.Module]) -> None:
        self._batches, self._models = batches, models

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if isinstance(self._batches, Tensor):
            raise DataError("data is a tensor, and not pairs: give [(images, labels)], or a DataLoader")
        for batch in self._batches:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise DataError(
                    f"data holds {kind_of(batch)}, and not pairs: give [(images, labels)], or a DataLoader"
                )
            images, labels = batch
            for student in map(_student_of, self._models.values()):
                check_images(images, student, values=True)
                if any_family(student) is not None:
                    check_size(student, (images.shape[-2], images.shape[-1]))
            self._check_labels(labels, len(images))
            yield images, labels, torch.ones_like(labels, dtype=torch.bool)

    def _check_labels(self, labels: object, count: int) -> None:
        if not isinstance(labels, Tensor) or labels.shape != (count,):
            shape = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else kind_of(labels)
            raise DataError(f"labels is {shape}: give a tensor ({count},), a class for each image")
        if labels.dtype != torch.long:
            raise DataError(f"labels is of {labels.dtype}: give labels.long()")

    @staticmethod
    def check_classes(name: str, logits: int, labels: Tensor) -> None:
        """Raise DataError for a label that a model has no class for."""
        if labels.min() < 0 or labels.max() >= logits:
            found = f"from {labels.min().item()} to {labels.max().item()}"
            raise DataError(f"labels are {found}, and the classes of {name} from 0 to {logits - 1}")


@torch.no_grad()
def score_models(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    loader: EvalLoader | _Batches,
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
    together = ensemble and len(models) > 1
    names = [*models, ENSEMBLE] if together else list(models)
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
                if isinstance(loader, _Batches):
                    loader.check_classes(name, logits.shape[-1], targets)
                else:
                    check_classes(name, logits.shape[-1], loader, subset)
                logits = logits if classes is None else logits[:, classes]
                log_probabilities.append(F.log_softmax(logits.float(), dim=-1))
                sums[name] += _score(log_probabilities[-1], targets, valid, precision)
            if together:
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


def _numbered(loader: EvalLoader | _Batches) -> int:
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


Family = Literal["top1", "knn", "probe", "distance", "seg_knn", "seg_probe"]
FAMILIES: dict[Family, str] = {
    "top1": "top-1 and top-5 of the model's own head, and its cross-entropy",
    "knn": "weighted nearest neighbors of the features among the training images",
    "probe": "logistic regression on the features of the training images",
    "distance": "of features and blocks' outputs from those of a teacher",
    "seg_knn": "as knn, of the patches of images with labeled pixels",
    "seg_probe": "as probe, of the patches of images with labeled pixels",
}
OF_PATCHES: tuple[Family, ...] = ("seg_knn", "seg_probe")
PROBES: tuple[Family, ...] = ("knn", "probe")
"""What needs the labeled images of the training split too."""


@dataclass(frozen=True)
class Against:
    """The teacher that distances are from, and which layers are compared by student."""

    teacher: Reader
    layers: Mapping[str, ComparedLayers]


def measure(
    readers: Mapping[str, Reader],
    families: Mapping[str, Collection[Family]],
    loader: EvalLoader,
    *,
    reference: EvalLoader | None = None,
    against: Against | None = None,
    accelerator: Accelerator | None = None,
    ensemble: bool = True,
    subset: str | None = None,
) -> dict[str, dict[str, float]]:
    """Return the numbers of each model by name, and of the ensemble of those whose own head counts.

    `families` says what is measured of each; `knn` and `probe` need `reference`, the labeled training images,
    `distance` needs `against`. The models are in eval mode. Call it on all processes, which get the same numbers.

    Raises DataError where data, classes and logits do not fit.
    """
    device = torch.device("cpu") if accelerator is None else accelerator.device

    def chosen(family: Family) -> list[str]:
        return [name for name in readers if family in families[name]]

    heads = {name: readers[name].logits for name in chosen("top1")}
    probes = _probes({family: chosen(family) for family in PROBES}, readers, reference, loader, device)
    results: dict[str, dict[str, float]] = {name: {} for name in readers}
    if heads or probes:
        found = score_models(
            heads, loader, others=probes, accelerator=accelerator, ensemble=ensemble, subset=subset
        )
        for name, metrics in found.items():
            model, _, family = name.rpartition(SEPARATOR)
            results.setdefault(model or name, {}).update(_flat_metrics(metrics, family if model else "top1"))
    if against is not None and (compared := chosen("distance")):
        students = {name: readers[name] for name in compared}
        distances = measure_distances(students, against.teacher, against.layers, loader, device)
        for name, distance in distances.items():
            results[name] |= flat_distances(distance)
    for reader in readers.values():
        reader.forget()
    return {name: _samples_last(numbers) for name, numbers in results.items()}


SEPARATOR = "\0"
"""Between the names of a model and of a probe on it."""


def _probes(
    wanted: Mapping[Family, list[str]],
    readers: Mapping[str, Reader],
    reference: EvalLoader | None,
    loader: EvalLoader,
    device: torch.device,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return classifiers of images on the features of each model, fitted on the `reference`."""
    names = list(dict.fromkeys(name for chosen in wanted.values() for name in chosen))
    if not names or reference is None:
        return {}
    check_same_classes(reference, loader)
    classifiers: dict[str, Callable[[Tensor], Tensor]] = {}
    features, labels = collect_features({name: readers[name] for name in names}, reference, device)
    for name in names:
        if name in wanted["knn"]:
            knn = NearestNeighbors(features[name], labels, reference.num_classes)
            classifiers[f"{name}{SEPARATOR}knn"] = _composed(knn, readers[name])
        if name in wanted["probe"]:
            probe = fit_probe(features[name], labels, reference.num_classes)
            classifiers[f"{name}{SEPARATOR}probe"] = _composed(probe, readers[name])
    return classifiers


def _composed(classify: Callable[[Tensor], Tensor], reader: Reader) -> Callable[[Tensor], Tensor]:
    return lambda images: classify(reader.feature(images))


def check_same_classes(reference: EvalLoader, loader: EvalLoader) -> None:
    """DataError where the labels of the two splits do not stand for the same classes."""
    if reference.class_names is not None and loader.class_names is not None:
        missing = set(loader.class_names) - set(reference.class_names)
        if missing or reference.class_names != loader.class_names:
            name = sorted(missing)[0] if missing else next(iter(loader.class_names))
            raise DataError(
                f"knn and probe need the same classes in both splits, and the training images have no class {name!r} "
                "or number it otherwise"
            )
    if loader.num_classes > reference.num_classes:
        raise DataError(
            f"knn and probe need the same classes in both splits, and these have {loader.num_classes} and "
            f"{reference.num_classes} of them; set --num_classes"
        )


@torch.no_grad()
def collect_features(
    readers: Mapping[str, Reader], loader: EvalLoader, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the features (N, D) of each model and the labels (N,) of all images, on every process, on the device.

    Raises DataError: there is no image.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in readers}
    labels, valids = [], []
    for images, targets, valid in loader:
        images = images.to(device, non_blocking=True)
        for name, reader in readers.items():
            rows[name].append(reader.feature(images))
        labels.append(targets.to(device, non_blocking=True))
        valids.append(valid.to(device, non_blocking=True))
    for reader in readers.values():
        reader.forget()
    if not labels or not bool((kept := gathered(torch.cat(valids))).any()):
        raise DataError("no image could be read: the training split is empty")
    return {name: gathered(torch.cat(each))[kept] for name, each in rows.items()}, gathered(
        torch.cat(labels)
    )[kept]


def _flat_metrics(metrics: Metrics, family: str) -> dict[str, float]:
    if family == "top1":
        return asdict(metrics)
    return {f"{family}_top1": metrics.top1, f"{family}_top5": metrics.top5, "samples": metrics.samples}


def flat_distances(distances: Distances) -> dict[str, float]:
    """`relative_error`, `cosine`, `cka` of the final feature, and the same with `_layer03` and so on of the blocks."""
    flat = {**_flat_distance(distances.feature), "samples": distances.feature.rows}
    for layer, distance in distances.layers.items():
        flat |= {f"{name}_layer{layer:02d}": value for name, value in _flat_distance(distance).items()}
    return flat


def _flat_distance(distance: Distance) -> dict[str, float]:
    numbers = {"relative_error": distance.relative_error, "cosine": distance.cosine, "cka": distance.cka}
    return {name: value for name, value in numbers.items() if value is not None}


def _samples_last(numbers: dict[str, float]) -> dict[str, float]:
    return {
        **{key: value for key, value in numbers.items() if key != "samples"},
        "samples": numbers["samples"],
    }


# What was measured of models, as a table and as JSON.

Numbers = Mapping[str, float]
PARTS = ("", "50", "75", "_small", "_medium", "_large")
"""Average precision: of all thresholds, of two, and of objects by size."""
COLUMNS = {
    "top1": ("top-1 % [95 % interval]", "7.2f"),
    "top5": ("top-5 %", "7.2f"),
    "loss": ("  loss", "6.4f"),
    "knn_top1": ("kNN top-1 % [95 % interval]", "11.2f"),
    "probe_top1": ("probe top-1 % [95 % interval]", "13.2f"),
    "relative_error": ("relative error", "14.4f"),
    "cosine": ("cosine", "6.4f"),
    "cka": ("   CKA", "6.4f"),
    **{
        f"{kind}_ap{part}": (f"{kind} AP{part.replace('_', ' ')}", "6.3f")
        for kind in ("box", "mask")
        for part in PARTS
    },
    "miou": ("  mIoU", "6.3f"),
    "seg_knn_miou": ("kNN mIoU", "6.3f"),
    "seg_probe_miou": ("probe mIoU", "6.3f"),
    "pixel_accuracy": ("pixel accuracy", "6.3f"),
    "samples": ("images", "6.0f"),
}
LAYER = "_layer"


def to_table(results: Mapping[str, Numbers]) -> str:
    """Return the results as a Markdown table, and another one by layer for each model that was measured so."""
    tables = [_table("model", results)]
    for name, numbers in results.items():
        layers = by_layer(numbers)
        if layers:
            tables.append(f"{name}, by layer:\n\n{_table('layer', layers)}")
    return "\n\n".join(tables)


def to_json(results: Mapping[str, Numbers]) -> str:
    """Return the results as a JSON object of objects."""
    return json.dumps({name: _with_intervals(numbers) for name, numbers in results.items()}, indent=2)


def _with_intervals(numbers: Numbers) -> dict[str, float | Interval]:
    return {**numbers, **{f"{name}_interval": found for name, found in intervals_of(numbers).items()}}


def by_layer(numbers: Numbers) -> dict[str, dict[str, float]]:
    """Group `cka_layer03` and the like by layer: {"03": {"cka": …}}."""
    layers: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        metric, found, layer = key.partition(LAYER)
        if found:
            layers.setdefault(layer, {})[metric] = value
    return layers


def _cell(key: str, numbers: Numbers) -> str:
    if key not in numbers:
        return ""
    low, high = intervals_of(numbers).get(key, (None, None))
    return format(numbers[key], COLUMNS[key][1]) + ("" if low is None else f" [{low:.1f}, {high:.1f}]")


def _table(title: str, rows: Mapping[str, Numbers]) -> str:
    shown = [key for key in COLUMNS if any(key in numbers for numbers in rows.values())]
    width = max(len(title), *(len(name) for name in rows)) if rows else len(title)
    heads = [COLUMNS[key][0] for key in shown]
    lines = [
        f"| {title:<{width}} | {' | '.join(heads)} |",
        f"| {'-' * width} | {' | '.join('-' * (len(head) - 1) + ':' for head in heads)} |",
    ]
    for name, numbers in rows.items():
        cells = [f"{_cell(key, numbers):>{len(COLUMNS[key][0])}}" for key in shown]
        lines.append(f"| {name:<{width}} | {' | '.join(cells)} |")
    return "\n".join(lines)
