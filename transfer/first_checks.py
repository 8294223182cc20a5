"""Mistakes in the settings of a run that are found without torch and without a model, and are refused at once."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.sources import check_there
from ..models.errors import ConfigError, DataError, GraftError
from ..models.plan_syntax import operators_in
from .config import SAME, DataConfig, RunConfig
from .methods.layer_choice import check_layers
from .mode_config import TEACHER
from .setting import check_effect


def check_first(run: RunConfig) -> None:
    """Raise a GraftError for settings that no run can have: a missing teacher, a setting that changes nothing, a
    warm-up as long as the run, or the text of a layer plan or of a choice of layers that is not valid."""
    if not run.teachers:  # else more is known: `check_teachers`
        check_teacher_given(run)
    check_effect(run)
    for index, loss in enumerate(run.transfer.terms if run.facts.transfers else ()):
        if isinstance(loss.layers, str):
            try:
                check_layers(loss.layers)
            except GraftError as error:
                place = f"transfer.losses[{index}]" if run.transfer.losses else "transfer"
                raise type(error)(str(error).replace("transfer", place, 1)) from error
    if run.student.plan is not None:
        operators_in(run.student.plan)


def check_places(run: RunConfig) -> None:
    """Raise a GraftError for a folder of images, or a path of weights, that is not there."""
    sources = [run.teacher.source, run.student.init, run.student.whole_name]
    sources += [teacher.source for teacher in run.teachers.values()]
    for source in sources:
        if source not in (None, TEACHER):
            check_there(str(source))
    check_head(run)
    if run.data.dataset in ("", "folder"):
        check_folder(run.data)


def check_head(run: RunConfig) -> None:
    """Raise ConfigError for a `dense.source` that is not there or is no detector or segmenter."""
    source = run.dense.source
    if source is None:
        return
    from ..checkpoints.dense_models import find_dense

    try:
        found = find_dense(source)
    except GraftError as error:
        raise ConfigError(f"dense.source: {error}") from error
    if found is None:
        raise ConfigError(f"dense.source={source} is no run or folder of a detector or segmenter: give one")


def check_folder(data: DataConfig) -> None:
    """Raise DataError for images in a folder where none is given, or it does not exist."""
    if data.data_path is None:
        raise DataError(
            "data.data_path is not set: give the data set's folder, or data.dataset=digits to try"
        )
    if not Path(data.data_path).exists():
        raise DataError(f"data.data_path={data.data_path} does not exist")


def check_teacher_given(run: RunConfig) -> None:
    """Raise ConfigError where the mode needs a teacher, or weights to start from, and none is named."""
    same = run.student.model == SAME
    if same and not run.reads_teacher and run.starting_source != TEACHER:
        raise ConfigError(
            f"student.model=same is the teacher's, and mode={run.mode} has no teacher: give a timm architecture"
        )
    if run.teacher.source is not None:
        return
    if same and not run.facts.taught:
        raise ConfigError(
            "student.model=same needs a teacher: set teacher.source, or give a timm architecture"
        )
    if run.facts.taught:
        raise ConfigError(
            f"mode={run.mode} needs a teacher: set teacher.source to a timm name, a hub name or a path"
        )
    if run.facts.starts_from == TEACHER and not (run.student.init or run.student.whole_name):
        raise ConfigError(f"mode={run.mode} needs weights to start from: set teacher.source or student.init")
