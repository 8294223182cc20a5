"""What the demo found, in plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .demo_cells import TeacherName
from .gaze_figures import Gaze

TITLES = {
    "scratch": "Scratch",
    "copy": "Attention copy",
    "distill": "Attention distillation",
    "finetune": "Fine-tune",
    "ensemble": "Ensemble",
}
SHORT_TITLES = {
    "scratch": "scratch",
    "copy": "copied",
    "distill": "distilled",
    "finetune": "fine-tuned",
    "ensemble": "ensemble",
}
TEACHER_TITLES: dict[TeacherName, str] = {
    "supervised": "the teacher knows the labels",
    "mae": "the teacher saw no label",
}


@dataclass(frozen=True)
class MethodResult:
    """A method with a teacher, over the seeds. Accuracies are in percent; a curve has a row a seed."""

    method: str
    teacher: TeacherName | None
    top1: Sequence[float]
    steps: Sequence[int] = ()
    curve: Sequence[Sequence[float]] = ()

    @property
    def title(self) -> str:
        return TITLES[self.method]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def deviation(self) -> float | None:
        """The sample deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class DemoResults:
    """The methods in the order of the table, and the setting that they were compared in."""

    methods: Sequence[MethodResult]
    divergences: Mapping[TeacherName, Mapping[str, Sequence[Sequence[float]]]]
    """From each teacher's maps, by method and layer, in nats: a row a seed."""
    gazes: Sequence[Gaze]
    seeds: Sequence[int]
    labels: int
    all_labels: int
    test_images: int
    teacher_top1: float
    """Of the supervised teacher; the other one names nothing."""
    teacher_steps: Mapping[TeacherName, int]
    student_steps: int
    minutes: float
    quick: bool

    @property
    def scratch(self) -> MethodResult:
        return self.find("scratch", None)

    def find(self, method: str, teacher: TeacherName | None) -> MethodResult:
        return next(found for found in self.methods if (found.method, found.teacher) == (method, teacher))

    def of(self, teacher: TeacherName) -> list[MethodResult]:
        """Return the methods that take something from this teacher."""
        return [method for method in self.methods if method.teacher == teacher]

    def gains(self, method: MethodResult) -> list[float]:
        """Return a method's gain over training from scratch, in points, seed by seed."""
        return [ours - theirs for ours, theirs in zip(method.top1, self.scratch.top1, strict=True)]

    def gain_error(self, method: MethodResult) -> float | None:
        """Return the standard error of the mean of `gains`; None for a single seed."""
        gains = self.gains(method)
        return statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
