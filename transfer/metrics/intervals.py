"""How far an accuracy on so many images may be from the model's own: 95 % intervals, in percent."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

ACCURACIES = ("top1", "knn_top1", "probe_top1")
Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)


def accuracy_interval(percent: float, samples: int) -> Interval:
    """Return the Wilson interval of an accuracy in percent on independent images (binomial)."""
    from scipy.stats import binomtest  # here: no run needs it before it reports

    found = binomtest(round(percent / 100 * samples), samples).proportion_ci(method="wilson")
    return 100 * found.low, 100 * found.high


def standard_error(percent: float, samples: int) -> float:
    """Return the standard error of an accuracy in percent that its Wilson interval stands for, never 0."""
    low, high = accuracy_interval(percent, samples)
    return (high - low) / (2 * Z)


def intervals_of(numbers: Mapping[str, float]) -> dict[str, Interval]:
    """Return the interval of each accuracy among the numbers of a model, by its name."""
    samples = round(numbers.get("samples", 0))
    return {
        name: accuracy_interval(numbers[name], samples) for name in ACCURACIES if name in numbers and samples
    }
