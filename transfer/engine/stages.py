"""Recipes of several runs: stages one after another on one student, or students side by side on one teacher.

Each stage has its own losses, optimizer and length.
A stage is a run with its own folder, so it resumes like every run, and a finished stage is not repeated.
The first stage creates the student; each other stage starts from the student of the one before, and converts it if its
plan is another one. Torch is imported when a stage is built, so that `--print_config` does without.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.atomic import write_folder, write_text
from ...checkpoints.files import safe_name
from ...checkpoints.sources import STUDENTS
from ...models.errors import ConfigError, GraftError, JsonDict, RunFailedError
from ..config import RunConfig
from ..first_checks import check_first, check_head
from ..setting import fields_of, find_unread, value_of, without
from .resume_check import refuse_existing

if TYPE_CHECKING:
    from .train import RunResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A named run in a sequence of runs."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class StagesResult:
    """The results of the stages; `signal` is the one that stopped them after a save."""

    results: dict[str, RunResult]
    output_dir: Path
    signal: int | None


def chain(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages with their run folders, and with the student that each starts from.

    Stage i has the folder `output_dir/<i>-<name>`.

    Raises ConfigError: there are no stages, two have the same name, a name is no part of a path, their output folders
    differ, or a stage after the first sets its student.
    """
    if not stages:
        raise ConfigError("stages is empty; give a list of stages, each with a name")
    names = [stage.name for stage in stages]
    folder = stages[0].config.output_dir
    for index, stage in enumerate(stages):
        if names.index(stage.name) != index:
            raise ConfigError(f"stages: two are called {stage.name!r}; each needs a name of its own")
        if stage.config.output_dir != folder:
            raise ConfigError(
                f"stages.{stage.name}.output_dir: all stages share one output_dir, set it above them"
            )
    chained: list[Stage] = []
    for index, stage in enumerate(stages):
        config = stage.config.model_copy(
            update={"output_dir": folder / f"{index + 1}-{safe_name(stage.name, 'stages')}"}
        )
        if chained:
            before = stages[index - 1].config.student.plan
            converts = config.student.plan is not None and config.student.plan != before
            config = _going_on(config, chained[-1].config.output_dir, converts=converts)
        chained.append(Stage(stage.name, config))
    return chained


def _going_on(config: RunConfig, before: Path, *, converts: bool) -> RunConfig:
    """Return the settings with the student of the stage before, without what only the creation of a student reads."""
    made: JsonDict = {
        "model": f"local-dir:{before / 'student'}",
        "model_args": {},
        "plan": config.student.plan if converts else None,
        "init": None,
    }
    chained = config.model_copy(update={"student": config.student.model_copy(update=made)})
    return without(chained, find_unread(chained).keys() - find_unread(config).keys())


def check_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return `chain(stages)`. Raise a GraftError for settings that one of the runs cannot have."""
    chained = chain(stages)
    for stage in chained:
        if stage.config.copies and stage is not chained[-1]:
            raise ConfigError(
                f"stage {stage.name}: its student runs with the teacher's attention, which is copied, and cannot be "
                "trained further: make it the last stage"
            )
    refuse_existing(stages[0].config.output_dir, "auto")
    check_each(chained, check_first)
    from .build import check_settings
    from .modes import mode_of

    check_each(chained, lambda config: check_settings(mode_of(config)))
    return chained


def check_each(stages: Sequence[Stage], check: Callable[[RunConfig], None], kind: str = "stage") -> None:
    """Check each stage or student. Raises the GraftError of the check, which then names it."""
    for stage in stages:
        try:
            check(stage.config)
        except GraftError as error:
            raise type(error)(f"{kind} {stage.name}: {error}") from error


def train_stages(stages: Sequence[Stage]) -> StagesResult:
    """Run `chain(stages)` to the end; resume a stage that was started.

    The last student is copied to `output_dir/student`; `output_dir/stages.json` has the metrics of each stage.
    Raises GraftError as `train`.
    """
    chained = check_stages(stages)
    check_each(chained, check_head)
    from ...checkpoints.model_folders import STAGES_FILE
    from .train import train

    folder = stages[0].config.output_dir
    results: dict[str, RunResult] = {}
    for stage in chained:
        logger.warning("stage %s in %s", stage.name, stage.config.output_dir)
        result = train(stage.config)
        results[stage.name] = result
        if not result.finished:
            return StagesResult(results, folder, result.signal)
        _write_results(folder / STAGES_FILE, results)
    _publish(result.output_dir, folder)
    return StagesResult(results, folder, None)


def _write_results(path: Path, results: dict[str, RunResult]) -> None:
    measured = {
        name: {"output_dir": str(result.output_dir), "steps": result.steps, **result.metrics}
        for name, result in results.items()
    }
    write_text(path, json.dumps(measured, indent=2) + "\n")


def _publish(last: Path, folder: Path) -> None:
    for name in STUDENTS:
        source = last / name
        if source.is_dir():
            size = sum(path.stat().st_size for path in source.iterdir())
            write_folder(folder / name, partial(_copy, source), size=size)


def _copy(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)


# Students: runs side by side on the same images and teachers, each with its own folder `output_dir/<name>`.
#
# A batch is read once, and the teachers run on it once. Otherwise each student is the run that it would be alone, bit
# for bit on a CPU: it is resumed, loaded and evaluated as one. The run with the fewest steps is next, so that after
# a restart from different states those ahead wait.

OWN = ("student.", "transfer.", "align.", "optim.")
"""Beginnings of the settings that may differ between students."""
SHARED = ("student.img_size", "optim.epochs", "optim.max_steps", "optim.accum_iter")
"""Settings among these that may not."""


@dataclass(frozen=True)
class StudentsResult:
    """The results of the students, and the errors of those that could not continue."""

    results: dict[str, RunResult]
    failures: dict[str, RunFailedError]
    signal: int | None


def check_students(students: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """Return the runs of the students, with their folders.

    Raises ConfigError: a name is no part of a path, the students do not agree on what they share, or a setting does not
    go with several students. Raises a GraftError for settings that one of the runs cannot have.
    """
    if not students:
        raise ConfigError("students is empty; give a mapping of names and settings, one of each student")
    for name in (name for name in students if name in ("jobs", *RunConfig.model_fields)):
        raise ConfigError(f"students.{name}: a section, or a folder of jobs, has this name; give another one")
    runs = {
        name: config.model_copy(update={"output_dir": config.output_dir / safe_name(name, "students")})
        for name, config in students.items()
    }
    first, *_ = students
    for name, config in students.items():
        _check_alone(name, config)
        _check_shared(name, config, first, students[first])
    refuse_existing(students[first].output_dir, "auto")
    check_each([Stage(name, config) for name, config in runs.items()], check_first, "student")
    return runs


def _check_shared(name: str, config: RunConfig, other_name: str, other: RunConfig) -> None:
    """Raise ConfigError for a setting that decides what both students see, and differs."""
    for key in fields_of(RunConfig):
        value, theirs = value_of(config, key), value_of(other, key)
        if value != theirs and (key in SHARED or not key.startswith(OWN)):
            raise ConfigError(
                f"students.{name}.{key}={value}, and {theirs} for {other_name}: all students of a run share it, so set "
                "it above them"
            )
    if config.needs_labels != other.needs_labels:
        raise ConfigError(
            f"students.{name}.transfer.task_weight={config.transfer.task_weight}, and {other.transfer.task_weight} for "
            f"{other_name}: either all students of a run learn from labels, or none"
        )


def _check_alone(name: str, config: RunConfig) -> None:
    """Raise ConfigError for a setting of runs that have a process for themselves."""
    of_a_process = [each for each in config.engine.trackers if each != "tensorboard"]
    refused = {
        "engine.fsdp=true": config.engine.fsdp,
        f"engine.trackers={','.join(of_a_process)}": bool(of_a_process),
        "teacher.shard=true": any(each.shard for each in (config.teacher, *config.teachers.values())),
        "transfer.cache": config.transfer.cache is not None,
        "student.compile=true": config.student.compile,
    }
    for setting in (setting for setting, given in refused.items() if given):
        raise ConfigError(
            f"students.{name}: {setting} does not go with several students in one run: leave it out"
        )


def train_students(students: Mapping[str, RunConfig]) -> StudentsResult:
    """Run all students to their ends, side by side; resume those that were started.

    One whose loss or weights are no longer finite stops alone. Raises GraftError as `train`, before the first step.
    """
    runs = check_students(students)
    from .build import one_teacher
    from .parallel import create_accelerator
    from .train import company, training

    results: dict[str, RunResult] = {}
    failures: dict[str, RunFailedError] = {}
    steps = dict.fromkeys(runs, -1)
    accelerators = {name: create_accelerator(config) for name, config in runs.items()}
    first = next(iter(runs))
    for config in runs.values():
        refuse_existing(config.output_dir, config.engine.resume)
    accelerators[first].wait_for_everyone()  # before the first process makes a folder

    def take_turn() -> None:
        name = min(steps, key=steps.__getitem__)
        if steps.pop(name) < 0:
            logger.warning("student %s in %s", name, runs[name].output_dir)
        try:
            steps[name] = next(going[name])
        except StopIteration as end:
            results[name] = end.value
        except RunFailedError as error:
            failures[name] = error.with_traceback(None)  # which would keep the student in memory
            logger.error("student %s stops alone: %s", name, error)

    with company(runs[first], accelerators[first], several=True) as others, ExitStack() as stack:
        going = {
            name: stack.enter_context(closing(training(config, accelerators[name], others)))
            for name, config in runs.items()
        }
        with one_teacher():
            while -1 in steps.values():
                take_turn()
        while steps:
            take_turn()
    signal = next((each.signal for each in results.values() if each.signal is not None), None)
    return StudentsResult(results, failures, signal)
