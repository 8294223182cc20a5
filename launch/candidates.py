"""The models that `graftvit evaluate` compares: runs, students and teachers, each a function from images to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from timm.utils.misc import natural_key
from torch import Tensor, nn

from ..checkpoints.class_names import comparable, places, same_classes
from ..checkpoints.model_folders import last_stage
from ..checkpoints.preprocessing import Preprocessing
from ..checkpoints.pretrained import Pretrained, load_pretrained
from ..checkpoints.report import some
from ..checkpoints.sources import FolderSource, parse_source
from ..models.errors import ConfigError
from ..models.families import pooling_of
from ..transfer.config import RunConfig, TeacherConfig
from ..transfer.metrics.distance import describe_features
from .load_config import load_config
from .source_flags import source_keywords


@dataclass(frozen=True)
class Candidate:
    """A model that is ready to predict: `predict` takes images preprocessed as `spec` describes."""

    name: str
    module: nn.Module
    predict: Callable[[Tensor], Tensor]
    spec: Preprocessing
    num_classes: int
    """The number of classes; 0 if the model has no head."""
    loaded: Pretrained
    """What its source says of it."""
    label_names: tuple[str, ...] | None = None
    """The class names of the head in order, if they are known."""


def run_config(source: str) -> RunConfig | None:
    """Return the configuration of the run in the folder `source` (its last stage), or None if `source` is no run."""
    parsed = parse_source(source)
    if not isinstance(parsed, FolderSource):
        return None
    folders = [last_stage(folder) or folder for folder in (parsed.path, parsed.path.parent)]
    found = [folder for folder in folders if (folder / "config.yaml").is_file()]
    return load_config(found[0] / "config.yaml") if found else None


def load_candidate(source: str, how: TeacherConfig) -> Candidate:
    """Load the model of a source.

    Args:
        source: A run folder, a student folder, or any teacher source.
        how: Architecture, arguments and resolution that replace those of the source.

    Raises:
        CheckpointError: if the source cannot be read.
    """
    loaded = load_pretrained(source, **source_keywords(how))
    spec = loaded.preprocessing
    classes = int(getattr(loaded.model, "num_classes", 0)) if loaded.has_head else 0
    return Candidate(source, loaded.model, loaded.model, spec, classes, loaded, loaded.label_names)


def describe_candidate(candidate: Candidate) -> list[str]:
    """Describe the features that kNN and the probe measure, and warn where the teacher has others."""
    name, own = candidate.name, pooling_of(candidate.module)
    lines = [f"kNN and probe of {name}: {describe_features(candidate.module)}"]
    teacher = candidate.loaded.provenance.get("teacher") or {}
    theirs = teacher.get("pooling")
    if theirs is not None and theirs != own:
        lines.append(
            f"warning: {name} is pooled by {own or 'nothing'} and its teacher {teacher.get('source')} by "
            f"{theirs or 'nothing'}: the kNN and probe accuracies of the two are of different features"
        )
    return lines


def check_alike(candidates: list[Candidate]) -> None:
    """Raise ConfigError if the models cannot take the same images or have different classes."""
    first = candidates[0]
    for other in candidates[1:]:
        if other.num_classes != first.num_classes:
            raise ConfigError(
                f"{other.name!r} has {other.num_classes} classes and {first.name!r} has {first.num_classes}; "
                "evaluate them one by one"
            )
        theirs, ours = (replace(each.spec, mean=(), std=()) for each in (other, first))
        differ = [
            field.name for field in fields(ours) if getattr(theirs, field.name) != getattr(ours, field.name)
        ]
        if differ:
            name = differ[0]
            raise ConfigError(
                f"{other.name!r} takes images of {name}={getattr(theirs, name)} and {first.name!r} of "
                f"{name}={getattr(ours, name)}; evaluate them one by one"
                + ("" if name == "input_size" else f", or give --{name} for all")
            )


def common_names(candidates: list[Candidate]) -> tuple[str, ...] | None:
    """Return the class names that number the labels of an evaluation: those of the first candidate that has names.

    Raises ConfigError if another candidate has other classes, or may have them in another order.
    """
    named = [(each.name, each.label_names) for each in candidates if each.label_names is not None]
    if not named:
        return None
    first, names = named[0]
    for other in candidates:
        theirs = other.label_names
        if not same_classes(names, theirs):
            foreign = [name for name in theirs or () if name not in names]
            raise ConfigError(
                f"{other.name!r} has classes that {first!r} does not have: {some(foreign, 5)}; evaluate them one by one"
            )
        if not comparable(names, theirs) and list(names) != sorted(names, key=natural_key):
            raise ConfigError(
                f"{other.name!r} does not name its classes, and the classes of {first!r} are not sorted; evaluate "
                "them one by one"
            )
    return names


def in_order(
    predict: Callable[[Tensor], Tensor], own: Sequence[str] | None, names: Sequence[str] | None
) -> Callable[[Tensor], Tensor]:
    """Return `predict` with its logits reordered from the classes `own` to the order of `names`."""
    columns = places(own, names)
    return predict if columns is None else lambda images: predict(images)[:, columns]


def predictor(candidate: Candidate, spec: Preprocessing) -> Callable[[Tensor], Tensor]:
    """Return `candidate.predict` for images that are normalized as `spec` says."""
    own = candidate.spec
    if (own.mean, own.std) == (spec.mean, spec.std):
        return candidate.predict
    mean, std, own_mean, own_std = (
        torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std, own.mean, own.std)
    )
    scale, shift = std / own_std, (mean - own_mean) / own_std

    def predict(images: Tensor) -> Tensor:
        return candidate.predict(images * scale.to(images) + shift.to(images))

    return predict
