"""Which teachers are sharded over the processes, and the settings that do not go with it."""

from __future__ import annotations

from ...models.errors import ConfigError
from ..config import RunConfig
from ..methods.loss_terms import term_methods
from .teacher_checks import section_of, teacher_settings, teachers_of_terms


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
