"""Which teachers a run names, what its losses learn from them, how they are sharded, and the mistakes in this."""

from __future__ import annotations

from collections.abc import Mapping

from ...checkpoints.pretrained import Pretrained, load_pretrained
from ...checkpoints.sources import HubSource, parse_source
from ...checkpoints.transformers_models import load_transformers
from ...models.errors import ConfigError
from ...models.parts import OutsideTeacher
from ..config import RunConfig, TeacherConfig
from ..methods.loss_terms import DEFAULT_TEACHER, check_teacher, choose_teachers, placed, term_methods


def teacher_settings(config: RunConfig) -> dict[str, TeacherConfig]:
    """Return the settings of all teachers by name."""
    return {DEFAULT_TEACHER: config.teacher, **config.teachers}


def section_of(name: str) -> str:
    """Return the key of the section of a teacher."""
    return name if name == DEFAULT_TEACHER else f"teachers.{name}"


def teachers_of_terms(config: RunConfig) -> list[str]:
    """Return the name of the teacher of each loss."""
    return choose_teachers(config.transfer, list(teacher_settings(config)))


def check_teachers(config: RunConfig) -> None:
    """Raise ConfigError for a teacher without a source, or one that no entry of `transfer.losses` learns from.

    Raises UnsupportedModelError instead if such a run also has a loss whose teacher does not fit it, because that
    mistake comes first for the user.
    """
    for name, teacher in config.teachers.items():
        if name == DEFAULT_TEACHER or not name.isidentifier():
            raise ConfigError(
                f"teachers.{name}: {name!r} cannot be the name of a further teacher; use letters, digits and _, "
                f"and another name than {DEFAULT_TEACHER!r}"
            )
        if teacher.source is None:
            raise ConfigError(
                f"teachers.{name}.source is not set: set it to a timm name, a hub name or a path"
            )
    chosen = teachers_of_terms(config)
    idle = [name for name in config.teachers if name not in chosen]
    if not idle and DEFAULT_TEACHER in chosen:
        return
    _check_fit(config, chosen)
    if idle:
        raise ConfigError(
            f"teachers.{idle[0]} teaches nothing: name it as the teacher of an entry of transfer.losses"
        )
    raise ConfigError(
        "no entry of transfer.losses learns from the section teacher: give one of the named teachers as "
        "teacher.source, and leave `teacher` out of its entries"
    )


def _check_fit(config: RunConfig, chosen: list[str]) -> None:
    """Raise UnsupportedModelError for a loss of layers whose teacher, known without a download, has none."""
    for index, (method, name) in enumerate(zip(term_methods(config.transfer), chosen, strict=True)):
        how = teacher_settings(config)[name]
        if not method.uses_layers or how.source is None or isinstance(parse_source(how.source), HubSource):
            continue
        teacher = load_transformers(how.source) or load_pretrained(
            how.source, model=how.model, model_args=how.model_args, download=False
        )
        with placed(config.transfer, index):
            check_teacher(teacher.model, method)


def check_compiles(config: RunConfig, teachers: Mapping[str, Pretrained]) -> None:
    """Raise ConfigError for a teacher of another library that is to be compiled: it may not be one graph."""
    for name, how in teacher_settings(config).items():
        if name in teachers and isinstance(teachers[name].model, OutsideTeacher):
            section = section_of(name)
            for key, compiles in {
                f"{section}.compile": how.compile,
                "student.compile": config.student.compile,
            }.items():
                if compiles:
                    raise ConfigError(
                        f"{key}=true does not go with the teacher {how.source}, which timm lacks: set it to false"
                    )


def check_something_to_learn(config: RunConfig) -> None:
    """Raise ConfigError if every loss has the weight 0."""
    methods, transfer = term_methods(config.transfer), config.transfer
    if transfer.task_weight != 0:
        return
    if all(method.copies for method in methods):
        raise ConfigError(
            f"transfer.task_weight=0 leaves nothing to learn: transfer.method={methods[0].name} has no loss of its own"
        )
    if all(method.copies or term.weight == 0 for method, term in zip(methods, transfer.terms, strict=True)):
        raise ConfigError(
            "transfer.task_weight=0 leaves nothing to learn, because the weight of each transfer loss is 0 too: raise "
            "one of them"
        )


def sharded_teachers(config: RunConfig) -> list[str]:
    """Return the names of the teachers that are sharded."""
    return [name for name, how in teacher_settings(config).items() if how.shard]


def check_sharding(config: RunConfig, processes: int) -> None:
    """Raise ConfigError for a sharded teacher that the run cannot have."""
    names = sharded_teachers(config)
    if not names:
        return
    key = f"{section_of(names[0])}.shard=true"
    if processes == 1:
        raise ConfigError(
            f"{key} shards over processes and this run has one: start it with torchrun, or set it to false"
        )
    compiled = [section_of(name) for name in names if teacher_settings(config)[name].compile]
    others = {
        "student.compile": config.student.compile,
        f"{compiled[0] if compiled else 'teacher'}.compile": bool(compiled),
        "transfer.share_drop_path": config.transfer.share_drop_path,
    }
    for other, chosen in others.items():
        if chosen:
            raise ConfigError(f"{other}=true cannot be used with {key}: set one of them to false")
    if config.transfer.cache is not None:
        raise ConfigError(f"transfer.cache cannot be used with {key}: leave one of them out")
    for method, name in zip(term_methods(config.transfer), teachers_of_terms(config), strict=True):
        if method.copies and name in names:
            raise ConfigError(
                f"{section_of(name)}.shard=true does not go with transfer.method={method.name}, whose student is saved "
                "with its teacher: set it to false"
            )
