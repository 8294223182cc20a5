"""A comparison from its first cell to its last: what is done stays, a cell that fails does not stop the others."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from ....checkpoints.files import digest
from ....models.converted import plan_of
from ....models.errors import ConfigError, GraftError, JsonDict, RunFailedError, one_sentence
from ....models.families import check_supported
from ...cells import StoppedError, left_to_run, load_record, refuse_links, run_in_turn, save_record
from ...data.loading import followed
from ...engine.build import identify_teachers
from ...engine.train import train
from ..benchmark_cases import load_average, machine
from .comparison_cells import TEACHER, Cell, Comparison, Record, Speed
from .student_cell import (
    check_cell,
    count_parameters,
    describe_teachers,
    fresh_model,
    is_linear,
    keep_maps,
    measure_speed,
    score_teacher,
    speed_models,
    teacher_of,
    train_cell,
)

logger = logging.getLogger(__name__)


def check_cells(comparison: Comparison, cells: Sequence[Cell]) -> None:
    """Build what every cell trains once, without weights.

    Raises ConfigError: a plan is not valid, does not fit the model at a size, or cannot learn from the losses of a
    stage.
    """
    teachers = cache(partial(describe_teachers, comparison))
    once = {(cell.name, cell.size): cell for cell in cells}
    for cell in followed(once.values(), len(once), "checks of the cells"):
        try:
            check_supported(fresh_model(comparison.config, cell.plan, cell.size))
            if cell.name != TEACHER:
                check_cell(comparison, cell, teachers)
        except GraftError as error:
            raise ConfigError(f"compare.plans: {cell.name} at {cell.size} px: {error}") from error


def run_compare(
    comparison: Comparison,
    cells: Sequence[Cell],
    *,
    tell: Callable[[str], None] = logger.info,
    after_cell: Callable[[], object] = lambda: None,
) -> list[str]:
    """Run the cells that are not done, and return the folders of those that failed.

    `tell` gets a line before and after each cell, and `after_cell` is called when its record is on the disk.

    Raises:
        StoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
        ConfigError: a cell was measured with other settings, or with another teacher, before; or a link leads out of
            the folder.
    """
    left = left_to_run(cells, comparison.state, tell)
    for cell in left:
        refuse_links(comparison.cell_folder(cell), comparison.folder)
    with _quiet_log():
        _make_teacher(comparison, tell)
        teacher = _identify_teachers(comparison)

        def run(cell: Cell) -> str:
            record = replace(_run_cell(comparison, cell), teacher=teacher)
            save_record(record, comparison.cell_folder(cell))
            after_cell()
            return _outcome(record)

        run_in_turn(left, run, tell)
    return [cell.folder for cell in left if comparison.state(cell) == "failed"]


def _identify_teachers(comparison: Comparison) -> str:
    """Return the digest of the identities of the teachers, "" without one.

    Raises ConfigError: a cell was measured with another teacher.
    """
    found = identify_teachers(*(stage.config for stage in comparison.stages))
    now = digest(found) if found else ""
    for record in comparison.records():
        if record.error is None and record.teacher not in ("", now):
            raise ConfigError(
                f"{comparison.folder / 'cells' / record.folder} was measured with another teacher than "
                f"{comparison.config.teacher.source} now holds; take another --output_dir, or remove it"
            )
    return now


def _make_teacher(comparison: Comparison, tell: Callable[[str], None]) -> None:
    config = comparison.teacher
    if config is None or (config.output_dir / "student" / "config.json").exists():
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ConfigError("train the teacher before an array: run with --only teacher first")
    refuse_links(config.output_dir, comparison.folder)
    tell(f"the teacher, in {config.output_dir}")
    result = train(config)
    if result.signal is not None:
        raise _stopped(result.signal, "the teacher's training")


def _stopped(number: int, where: str) -> StoppedError:
    return StoppedError(number, f"in {where}, its state is saved")


def _run_cell(comparison: Comparison, cell: Cell) -> Record:
    try:
        found = _teacher_numbers(comparison, cell) if cell.name == TEACHER else _numbers(comparison, cell)
    except StoppedError:
        raise
    except KeyboardInterrupt as interrupt:
        raise _stopped(signal.SIGINT, cell.folder) from interrupt
    except GraftError as error:
        found = {"error": str(error)}
    except Exception as error:  # whatever breaks in one cell, the others go on
        logger.warning("%s failed", cell.folder, exc_info=True)
        found = {"error": one_sentence(f"{type(error).__name__}: {error}")}
    settings = comparison.digest(cell)
    return Record(
        cell.name, cell.plan, cell.size, settings, machine(), load_average(), seed=cell.seed, **found
    )


def _teacher_numbers(comparison: Comparison, cell: Cell) -> JsonDict:
    config = comparison.config
    teacher = teacher_of(config, config.teacher.img_size or cell.size)
    score = score_teacher(config, teacher)
    keep_maps(teacher, config.data, comparison.cell_folder(cell))
    return {
        "parameters": count_parameters(teacher.model)[0],
        "scores": [] if score is None else [score],
        "speeds": _speeds(comparison, cell),
    }


def _numbers(comparison: Comparison, cell: Cell) -> JsonDict:
    folder = comparison.cell_folder(cell)
    trained = train_cell(comparison.stages_of(cell), cell, folder, comparison.compare.error_batches)
    if isinstance(trained, int):
        raise _stopped(trained, cell.folder)
    keep_maps(trained.loaded, comparison.config.data, folder)
    parameters, new = count_parameters(trained.student)
    return {
        "converted": plan_of(trained.student) is not None,
        "linear": is_linear(trained.student),
        "parameters": parameters,
        "new_parameters": new,
        "scores": trained.scores,
        "speeds": _speeds(comparison, cell),
        "layer_errors": trained.errors,
    }


def _speeds(comparison: Comparison, cell: Cell) -> list[Speed]:
    """Measure at the training's image size and at those of `speed_img_size`, with as many pixels in a batch.

    Models of other seeds than the first are as fast as that of the first.
    """
    compare, speeds = comparison.compare, list[Speed]()
    if cell.seed is not None and cell.seed != compare.seeds[0]:
        return speeds
    for size in sorted({cell.size, *compare.speed_img_size}):
        batch = max(1, compare.batch_size * cell.size**2 // size**2)
        models = speed_models(comparison.config, cell.plan, size)
        speeds.append(measure_speed(*models, size, batch, compare.repeats, comparison.device))
    return speeds


def _outcome(record: Record) -> str:
    if record.error is not None:
        return f"failed: {record.error}"
    scores = ", ".join(f"{score.stage} {score.top1:.1f} %" for score in record.scores)
    return f"{scores or 'no accuracy'}; {record.seconds:.0f} s of training"


def raise_failed(failed: Sequence[str], folder: Path) -> None:
    """Raise RunFailedError with the names of the cells that failed, if any."""
    if len(failed) == 1:
        record = load_record(Record, folder / "cells" / failed[0])
        why = "" if record is None else f": {record.error}"
        raise RunFailedError(f"the cell {failed[0]} failed{why}; the same command tries it again")
    if failed:
        names = ", ".join(failed)
        raise RunFailedError(
            f"{len(failed)} cells failed ({names}), see {folder / 'cells'}/<cell>/cell.json; "
            "the same command tries them again"
        )


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep the runs' own records to their log.jsonl."""
    logs = [logging.getLogger(name) for name in ("graftvit.transfer.engine", "graftvit.transfer.align")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
