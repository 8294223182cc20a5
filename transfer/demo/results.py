"""What the demo found, in plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .gaze_figures import Gaze

TITLES = {
    "scratch": "Scratch",
    "finetune": "Fine-tune",
    "copy": "Attention copy",
    "distill": "Attention distillation",
    "ensemble": "Ensemble",
}


@dataclass(frozen=True)
class MethodResult:
    """One method over the seeds. Accuracies are in percent; curve and divergence have a row a seed."""

    name: str
    top1: Sequence[float]
    steps: Sequence[int] = ()
    curve: Sequence[Sequence[float]] = ()
    divergence: Sequence[Sequence[float]] = ()

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def deviation(self) -> float | None:
        """Sample deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class DemoResults:
    """The methods in the order of the table, and the setting that they were compared in."""

    methods: Sequence[MethodResult]
    gazes: Sequence[Gaze]
    seeds: Sequence[int]
    labels: int
    unlabelled: int
    test_images: int
    teacher_steps: int
    student_steps: int
    minutes: float
    quick: bool

    def method(self, name: str) -> MethodResult:
        return next(method for method in self.methods if method.name == name)

    def gains(self, name: str) -> list[float]:
        """What a method is better by than training from scratch, in points, seed by seed."""
        scratch = self.method("scratch").top1
        return [ours - theirs for ours, theirs in zip(self.method(name).top1, scratch, strict=True)]

    def gain_error(self, name: str) -> float | None:
        """Standard error of the mean of `gains`; None for a single seed."""
        gains = self.gains(name)
        return statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
