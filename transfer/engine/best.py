"""The metric that selects the best state of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ...checkpoints.class_names import Head, same_classes
from ...models.errors import ConfigError
from ...models.families import vit
from ..config import Metric
from ..data.loaders import EvalLoader
from ..metrics.measure import PROBES, Family
from .modes import Mode

Kind = Family | Literal["objective", "goal"]


@dataclass(frozen=True)
class Criterion:
    """A metric of an evaluation, `test_<key>` in the log."""

    key: str
    kind: Kind
    """The measurement; `objective` is the run's own loss on the test images, `goal` what its goal measures."""

    @property
    def smaller(self) -> bool:
        """Return whether smaller values are better."""
        return self.key in ("loss", "objective", "relative_error")

    def describe(self) -> str:
        """Describe the best state in words."""
        return f"the state with the {'smallest' if self.smaller else 'largest'} test_{self.key}"

    def better(self, value: float, best: float | None) -> bool:
        """Return whether `value` is better than `best`. The first value (`best` is None) always is."""
        return best is None or (value < best if self.smaller else value > best)


CRITERIA: dict[Metric, Criterion] = {
    "top1": Criterion("top1", "top1"),
    "knn": Criterion("knn_top1", "knn"),
    "probe": Criterion("probe_top1", "probe"),
}


def classifies(head: Head, loader: EvalLoader | None) -> bool:
    """Return whether the labels of these images are the head's classes, in any order."""
    if loader is None or not 0 < head.num_classes == loader.num_classes:
        return False
    return same_classes(head.label_names, loader.class_names)


def choose(
    mode: Mode,
    *,
    head: Head,
    loader: EvalLoader | None,
    student: nn.Module,
    teacher: nn.Module | None,
) -> Criterion | None:
    """Return the metric that `engine.metric` selects; None without evaluation (the last state is then the best).

    `head` is the student's head, `loader` has the test images.

    Raises ConfigError: this run cannot measure the metric.
    """
    classified = classifies(head, loader)
    config = mode.config
    metric = config.engine.metric
    if mode.goal.measures:
        if metric != "auto":
            raise ConfigError(
                f"engine.metric={metric} is of classifiers, and dense.head has its own: leave it out"
            )
        return None if loader is None or mode.goal.best is None else Criterion(mode.goal.best, "goal")
    if metric == "auto":
        metric = mode.default_metric(classified)
        if loader is None or metric == "auto":
            return None
    if loader is None:
        raise ConfigError(
            f"engine.metric={metric} needs test images: give a validation split, or set it to auto"
        )
    if metric == "top1" and not classified:
        raise ConfigError(
            "engine.metric=top1 needs labels and a head of as many classes; use knn, probe, distance or loss"
        )
    if metric in PROBES and not loader.num_classes:
        raise ConfigError(
            f"engine.metric={metric} needs labels, and the test images have none; use distance or loss"
        )
    if metric == "distance" and not config.facts.taught:
        raise ConfigError(
            f"engine.metric=distance needs a teacher, and mode={config.mode} has none; use loss or knn"
        )
    if metric == "distance":
        same_width = teacher is not None and _width(teacher) == _width(student)
        return Criterion("relative_error" if same_width else "cka", "distance")
    if metric == "loss":
        return Criterion("loss", "top1") if config.needs_labels else Criterion("objective", "objective")
    return CRITERIA[metric]


def _width(model: nn.Module) -> int:
    """Return the width of the head's input."""
    return int(getattr(model, "head_hidden_size", None) or vit(model).num_features)
