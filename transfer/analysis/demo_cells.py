"""The cells of the demo: two teachers, and the `digits_*` recipes once a seed for each student of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from ...checkpoints.files import read_records
from ...models.errors import Json, JsonDict
from ...models.plain_yaml import parse_yaml
from ..cells import Ending, State, cell_state, digest, save_record
from ..config import RunConfig
from ..engine.train import train
from ..setting import dump_decisive

TeacherName = Literal["supervised", "mae"]
TEACHERS: dict[TeacherName, str] = {"supervised": "digits_teacher", "mae": "digits_pretrain"}
"""Each teacher's recipe: all labels, or none and half of each image."""
POOLING: dict[TeacherName, JsonDict] = {"supervised": {"student": {"global_pool": "avg"}}, "mae": {}}
"""The recipe's class token reads the image; the students' patches do, so their teacher's must."""
STUDENTS: tuple[tuple[str, TeacherName | None], ...] = (
    ("scratch", None),
    ("copy", "supervised"),
    ("distill", "supervised"),
    ("finetune", "mae"),
    ("copy", "mae"),
    ("distill", "mae"),
)
SECONDS_AN_EPOCH: dict[TeacherName, float] = {"supervised": 2.0, "mae": 1.3}
SECONDS_A_STUDENT = {"scratch": 16.0, "copy": 18.0, "distill": 20.0, "finetune": 16.0}
"""On one core of the machine that the demo was made on; only the ratios matter."""
QUICK_TEACHER_EPOCHS: dict[TeacherName, int] = {"supervised": 25, "mae": 40}


@dataclass(frozen=True)
class Cell:
    """One run: how it learns, from which teacher, its seed (None for a teacher) and its settings."""

    method: str
    teacher: TeacherName | None
    seed: int | None
    config: RunConfig
    seconds: float
    """What the run takes, to tell how long the others will."""
    needs: Path | None = None
    """The folder of the teacher that must be there before."""
    threads: int = 1

    @property
    def folder(self) -> Path:
        return self.config.output_dir

    def __str__(self) -> str:
        if self.seed is None:
            return f"{self.teacher} teacher"
        teacher = "" if self.teacher is None else f" ({self.teacher} teacher)"
        return f"{self.method}{teacher} seed {self.seed}"

    def records(self) -> list[JsonDict]:
        """Return the epochs of the run's log so far."""
        return [record for record in read_records(self.folder / "log.jsonl") if "n_parameters" in record]

    def curve(self) -> list[tuple[int, float]]:
        """Return (step, accuracy on the test images in percent) at each evaluation so far."""
        return [(record["step"], record["test_top1"]) for record in self.records() if "test_top1" in record]

    def progress(self) -> float:
        """Return the share of the run that is done, by its log."""
        records, optim = self.records(), self.config.optim
        if not records:
            return 0.0
        if optim.max_steps is not None:
            return float(records[-1]["step"]) / optim.max_steps
        return (float(records[-1]["epoch"]) + 1) / optim.epochs

    @property
    def settings(self) -> str:
        """The digest of all that the cell's numbers depend on, but for its teacher's weights."""
        return digest([dump_decisive(self.config, {"teacher"}), self.threads])

    def state(self) -> State:
        """Return how far the cell is. Raises ConfigError: it was run with other settings."""
        return cell_state(self.folder, self.settings, "settings or another --threads")

    def run(self) -> int | None:
        """Run the cell to its end, and write its record; returns the signal that stopped it before."""
        torch.set_num_threads(self.threads)
        result = train(self.config)
        if result.signal is None:
            save_record(Ending(self.settings), self.folder)
        return result.signal


def demo_cells(output_dir: Path, seeds: Sequence[int], quick: bool, threads: int = 1) -> list[Cell]:
    """List the teachers, then the students seed by seed. A seed decides labels, weights and augmentation.

    The quick form trains the teachers for less time, and has run folders of its own.
    """
    runs = output_dir / ("quick" if quick else "runs")
    teachers = {name: _teacher(name, runs, quick) for name in TEACHERS}
    students = [
        _student(method, None if teacher is None else teachers[teacher], seed, runs)
        for seed in seeds
        for method, teacher in STUDENTS
    ]
    return [replace(cell, threads=threads) for cell in (*teachers.values(), *students)]


def _teacher(name: TeacherName, runs: Path, quick: bool) -> Cell:
    shorter = {"optim": {"epochs": QUICK_TEACHER_EPOCHS[name]}} if quick else {}
    config = recipe(TEACHERS[name], runs / f"teacher_{name}", {**POOLING[name], **shorter})
    return Cell("teacher", name, None, config, seconds=config.optim.epochs * SECONDS_AN_EPOCH[name])


def _student(method: str, teacher: Cell | None, seed: int, runs: Path) -> Cell:
    changes: JsonDict = {"seed": seed, "data": {"label_seed": seed}}
    if teacher is None:
        name = f"{method}_{seed}"
    else:
        name = f"{method}_{teacher.teacher}_{seed}"
        changes["teacher"] = {"source": f"local-dir:{teacher.folder / 'student'}"}
    config = recipe(f"digits_{method}", runs / name, changes)
    return Cell(
        method,
        None if teacher is None else teacher.teacher,
        seed,
        config,
        seconds=SECONDS_A_STUDENT[method],
        needs=None if teacher is None else teacher.folder,
    )


def recipe(name: str, folder: Path, changes: Json) -> RunConfig:
    """Return the packaged recipe `name` with the run folder `folder` and `changes`; no tracker and no report."""
    text = resources.files("graftvit.cfgs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    content = _merged(
        parse_yaml(text), {"engine": {"trackers": [], "report": False}, **changes, "output_dir": folder}
    )
    return RunConfig.model_validate(content)


def _merged(below: Json, above: Json) -> JsonDict:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
