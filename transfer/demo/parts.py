"""The runs of the demo: the `digits_*` recipes, once for the teacher and once a seed for each student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..config import RunConfig

STUDENTS = ("scratch", "finetune", "copy", "distill")
QUICK_TEACHER_EPOCHS = 40
QUICK_EVAL_EVERY = 50


@dataclass(frozen=True)
class Part:
    """One run: what it is, its seed (None for the teacher, which all seeds share) and its settings."""

    name: str
    seed: int | None
    config: RunConfig

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def __str__(self) -> str:
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


def demo_parts(output_dir: Path, seeds: Sequence[int], quick: bool) -> list[Part]:
    """The teacher, then the students seed by seed. A seed decides labels, fresh weights and augmentation.

    The quick form trains the teacher for less time, tests less often, and has run folders of its own.
    """
    runs = output_dir / ("quick" if quick else "runs")
    changes: dict[str, Any] = {"optim": {"epochs": QUICK_TEACHER_EPOCHS}} if quick else {}
    teacher = Part("teacher", None, recipe("digits_pretrain", runs / "teacher", changes))
    shared = {"engine": {"eval_every": QUICK_EVAL_EVERY}} if quick else {}
    source = {"teacher": {"source": f"local-dir:{teacher.folder / 'student'}"}}
    students = []
    for seed in seeds:
        for name in STUDENTS:
            own = {
                "seed": seed,
                "data": {"label_seed": seed},
                **shared,
                **({} if name == "scratch" else source),
            }
            students.append(Part(name, seed, recipe(f"digits_{name}", runs / f"{name}_{seed}", own)))
    return [teacher, *students]


def recipe(name: str, folder: Path, changes: Mapping[str, Any]) -> RunConfig:
    """The packaged recipe `name` with the run folder `folder` and `changes`; no event files for a tracker."""
    text = resources.files("graftvit.cfgs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content = _merged(yaml.safe_load(text), {"engine": {"trackers": []}, **changes, "output_dir": folder})
    return RunConfig.model_validate(content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
