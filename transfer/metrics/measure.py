"""Everything that is measured of models on a split: accuracy, nearest neighbors, a linear probe, distances."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...models.errors import DataError
from ..data.loaders import EvalLoader
from ..evaluate import Metrics, evaluate
from .distance import ComparedLayers, Distance, Distances, measure_distances
from .knn import NearestNeighbors
from .probe import fit_probe
from .ranks import gathered
from .reader import Reader

if TYPE_CHECKING:
    from accelerate import Accelerator

Family = Literal["top1", "knn", "probe", "distance"]
FAMILIES: dict[Family, str] = {
    "top1": "top-1 and top-5 of the model's own head, and its cross-entropy",
    "knn": "weighted nearest neighbors of the features among the training images",
    "probe": "logistic regression on the features of the training images",
    "distance": "of features and blocks' outputs from those of a teacher",
}
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
        found = evaluate(
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
