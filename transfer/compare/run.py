"""A comparison from its first cell to its last: what is done stays, a cell that fails does not stop the others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...models.errors import ConfigError, GraftError, RunFailedError, one_sentence
from ..benchmark.rows import load_average, machine
from ..config import RunConfig
from ..engine.stages import Stage
from ..engine.train import train
from .cells import TEACHER, Cell, array_share, list_cells, only_named
from .record import Record, Speed, load_record, save_record
from .settings import CompareConfig
from .speed import measure_speed
from .student_cell import (
    count_parameters,
    fresh_model,
    is_linear,
    score_teacher,
    speed_models,
    teacher_of,
    train_cell,
)

logger = logging.getLogger(__name__)


class CompareStoppedError(GraftError):
    """A signal ended the comparison between two steps; what was done is saved."""

    def __init__(self, number: int, cell: str) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} in {cell}, its state is saved; the same command goes on from there"
        )
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Comparison:
    """One teacher, the stages that every student goes through, and the plans."""

    stages: Sequence[Stage]
    compare: CompareConfig
    teacher: RunConfig | None = None
    """The run that makes the teacher, where one does."""

    @property
    def folder(self) -> Path:
        return self.stages[0].config.output_dir

    @property
    def config(self) -> RunConfig:
        return self.stages[0].config

    @property
    def has_teacher(self) -> bool:
        return self.config.teacher.source is not None

    def cells(self) -> list[Cell]:
        """All cells, in the order of the table. Raises ConfigError: a name or a size is not valid."""
        sizes = self.compare.img_size or (_side(self.config),)
        return list_cells(self.compare.plans, sizes, teacher=self.has_teacher)

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.folder

    def records(self) -> list[Record]:
        """The cells that are done or failed, in the order of the table."""
        found = (load_record(self.cell_folder(cell)) for cell in self.cells())
        return [record for record in found if record is not None]


def choose_cells(
    comparison: Comparison, only: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> list[Cell]:
    """The cells of this command: those of the names, and of them this array job's share."""
    return array_share(only_named(comparison.cells(), only), environment)


def check_plans(comparison: Comparison) -> None:
    """Builds every student once. Raises GraftError: a plan is none, or does not fit the model at a size."""
    for cell in comparison.cells():
        try:
            fresh_model(comparison.config, cell.plan, cell.size)
        except GraftError as error:
            raise ConfigError(f"compare.plans: {cell.name} at {cell.size} px: {error}") from error


def run_compare(
    comparison: Comparison,
    cells: Sequence[Cell],
    *,
    tell: Callable[[str], None] = logger.info,
    after_cell: Callable[[], object] | None = None,
) -> list[str]:
    """Runs the cells that are not done, and returns the folders of those that failed.

    `tell` gets a line before and after each cell, and `after_cell` is called when its record is on the disk.

    Raises:
        CompareStoppedError: on SIGINT, SIGTERM or SIGUSR2, after saving.
        ConfigError: a cell was measured with other settings, or with another teacher, before.
    """
    left = [cell for cell in cells if not _done(comparison, cell)]
    tell(f"{len(cells) - len(left)} of {len(cells)} cells are done")
    with _quiet_log():
        _make_teacher(comparison, tell)
        teacher = _identify_teacher(comparison) if left else ""
        failed = []
        for number, cell in enumerate(left, 1):
            tell(f"[{number}/{len(left)}] {cell.name}, {cell.size} px: {cell.plan or 'as it is'}")
            record = _run_cell(comparison, cell)
            save_record(replace(record, teacher=teacher), comparison.cell_folder(cell))
            if after_cell is not None:
                after_cell()
            tell(f"    {_outcome(record)}")
            failed += [cell.folder] * (record.error is not None)
    return failed


def _done(comparison: Comparison, cell: Cell) -> bool:
    record = load_record(comparison.cell_folder(cell))
    if record is None or record.error is not None:
        return False
    if record.settings != digest(comparison, cell):
        raise ConfigError(
            f"{comparison.cell_folder(cell)} was measured with other settings; take another --output_dir, or remove it"
        )
    return True


def _identify_teacher(comparison: Comparison) -> str:
    """The digest of the teacher's weights, "" without one. Raises ConfigError: a cell was measured with others."""
    if comparison.config.teacher.source is None:
        return ""
    now = teacher_of(comparison.config).digest or ""
    for cell in comparison.cells():
        record = load_record(comparison.cell_folder(cell))
        if record is not None and record.error is None and record.teacher not in ("", now):
            raise ConfigError(
                f"{comparison.cell_folder(cell)} was measured with another teacher than "
                f"{comparison.config.teacher.source} now holds; take another --output_dir, or remove it"
            )
    return now


def digest(comparison: Comparison, cell: Cell) -> str:
    """Of all settings that the cell's numbers depend on."""
    settings = [stage.config.model_dump(mode="json", exclude={"output_dir"}) for stage in comparison.stages]
    for each in settings:
        each["student"].pop("plan")
        for name in ("data_path", "workers", "stage"):
            each["data"].pop(name)
        for name in ("stop_grace", "save_minutes"):
            each["engine"].pop(name)
    made = (
        None
        if comparison.teacher is None
        else comparison.teacher.model_dump(
            mode="json",
            exclude={"output_dir": True, "data": {"stage"}, "engine": {"stop_grace", "save_minutes"}},
        )
    )
    if made is not None:
        for each in settings:
            each["teacher"].pop("source")  # a path
    measured = comparison.compare.model_dump(mode="json", exclude={"plans", "img_size"})
    whole = [settings, made, measured, cell.plan, cell.size]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def _make_teacher(comparison: Comparison, tell: Callable[[str], None]) -> None:
    config = comparison.teacher
    if config is None or (config.output_dir / "student" / "config.json").exists():
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ConfigError("the teacher must be there before an array: run with --only teacher first")
    tell(f"the teacher, in {config.output_dir}")
    result = train(config)
    if result.signal is not None:
        raise CompareStoppedError(result.signal, "the teacher's training")


def _run_cell(comparison: Comparison, cell: Cell) -> Record:
    try:
        return (
            _teacher_record(comparison, cell) if cell.name == TEACHER else _student_record(comparison, cell)
        )
    except CompareStoppedError:
        raise
    except KeyboardInterrupt as interrupt:
        raise CompareStoppedError(signal.SIGINT, cell.folder) from interrupt
    except GraftError as error:
        return _record(comparison, cell, error=str(error))
    except Exception as error:  # whatever breaks in one cell, the others go on
        logger.warning("%s failed", cell.folder, exc_info=True)
        return _record(comparison, cell, error=one_sentence(f"{type(error).__name__}: {error}"))


def _record(comparison: Comparison, cell: Cell, error: str) -> Record:
    return Record(
        cell.name, cell.plan, cell.size, digest(comparison, cell), machine(), load_average(), error=error
    )


def _teacher_record(comparison: Comparison, cell: Cell) -> Record:
    student = comparison.config.student.model_copy(update={"img_size": cell.size})
    config = comparison.config.model_copy(update={"student": student})
    teacher = teacher_of(config)
    score = score_teacher(config, teacher)
    return Record(
        cell.name,
        None,
        cell.size,
        digest(comparison, cell),
        machine(),
        load_average(),
        parameters=count_parameters(teacher.model)[0],
        scores=[] if score is None else [score],
        speeds=_speeds(comparison, cell),
    )


def _student_record(comparison: Comparison, cell: Cell) -> Record:
    folder = comparison.cell_folder(cell)
    trained = train_cell(comparison.stages, cell, folder, comparison.compare.error_batches)
    if trained.signal is not None:
        raise CompareStoppedError(trained.signal, cell.folder)
    parameters, new = count_parameters(trained.student)
    return Record(
        cell.name,
        cell.plan,
        cell.size,
        digest(comparison, cell),
        machine(),
        load_average(),
        linear=is_linear(trained.student),
        parameters=parameters,
        new_parameters=new,
        scores=trained.scores,
        speeds=_speeds(comparison, cell),
        layer_errors=trained.errors,
    )


def device_of(comparison: Comparison) -> torch.device:
    """Where speed is measured."""
    auto = comparison.config.engine.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if auto else "cpu")


def _speeds(comparison: Comparison, cell: Cell) -> list[Speed]:
    """At the size of the training, and at those of `speed_img_size`, with as many pixels in a batch."""
    compare, config = comparison.compare, comparison.config
    device, speeds = device_of(comparison), []
    for size in sorted({cell.size, *compare.speed_img_size}):
        batch = max(1, compare.batch_size * cell.size**2 // size**2)
        models = speed_models(config, cell.plan, size)
        speeds.append(measure_speed(*models, size, batch, compare.repeats, device))
    return speeds


def _side(config: RunConfig) -> int:
    from ..engine.students import input_size

    _, height, width = input_size(config.student)
    if height != width:
        raise ConfigError(f"student.img_size is {height}x{width}; a comparison takes square images")
    return height


def _outcome(record: Record) -> str:
    if record.error is not None:
        return f"failed: {record.error}"
    scores = ", ".join(f"{score.stage} {score.top1:.1f} %" for score in record.scores)
    return f"{scores or 'no accuracy'}; {record.seconds:.0f} s of training"


def raise_failed(failed: Sequence[str], folder: Path) -> None:
    """RunFailedError that names the cells that failed, where there are any."""
    if len(failed) == 1:
        record = load_record(folder / "cells" / failed[0])
        why = "" if record is None else f": {record.error}"
        raise RunFailedError(f"the cell {failed[0]} failed{why}; the same command tries it again")
    if failed:
        names = ", ".join(failed)
        raise RunFailedError(
            f"{len(failed)} cells failed ({names}), why stands in {folder / 'cells'}/<cell>/cell.json; "
            "the same command tries them again"
        )


@contextmanager
def _quiet_log() -> Iterator[None]:
    """The runs' own records stay in their log.jsonl."""
    logs = [logging.getLogger(name) for name in ("graftvit.transfer.engine", "graftvit.transfer.recovery")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
