"""Stages: runs one after another on one student, each with its own losses, optimizer and length.

A stage is a run with its own folder, so it resumes like every run, and a finished stage is not repeated.
The first stage creates the student; each other stage starts from the student of the one before, and converts it if its
plan is another one. Torch is imported when a stage is built, so that `--print_config` does without.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.atomic import write_folder, write_text
from ...checkpoints.files import safe_name
from ...checkpoints.sources import STUDENTS
from ...models.errors import ConfigError, GraftError, JsonDict
from ..config import RunConfig
from ..first_checks import check_first, check_head
from ..setting import find_unread, without
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
    _check_each(chained, check_first)
    from .build import check_settings
    from .modes import mode_of

    _check_each(chained, lambda config: check_settings(mode_of(config)))
    return chained


def _check_each(stages: Sequence[Stage], check: Callable[[RunConfig], None]) -> None:
    for stage in stages:
        try:
            check(stage.config)
        except GraftError as error:
            raise type(error)(f"stage {stage.name}: {error}") from error


def train_stages(stages: Sequence[Stage]) -> StagesResult:
    """Run `chain(stages)` to the end; resume a stage that was started.

    The last student is copied to `output_dir/student`; `output_dir/stages.json` has the metrics of each stage.
    Raises GraftError as `train`.
    """
    chained = check_stages(stages)
    _check_each(chained, check_head)
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
