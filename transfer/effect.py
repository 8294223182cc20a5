"""Which settings change a run: each part of a run declares what it reads, and what no part reads is refused.

No torch here; `engine/run_parts.py` lists the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ..models.errors import ConfigError, JsonDict
from .config import RunConfig

OUTSIDE = frozenset(
    {
        "output_dir", "data.workers", "data.max_bad_images", "engine.log_interval", "engine.save_every",
        "engine.save_minutes", "engine.keep_states", "engine.stop_grace", "engine.resume", "engine.trackers",
        "engine.progress",
    }
)  # fmt: skip
"""Settings of where a run is, what it records and when it saves. They change no number, and every run reads them."""
PLACES = frozenset(
    {"data.data_path", "data.stage", "data.download", "transfer.cache", "transfer.cache_limit"}
)
"""Settings of where images and targets lie. They change no number either, where the images are the same."""
OFF: dict[str, Any] = {
    "data.hflip": 0.0,
    "data.smoothing": 0.0,
    "data.val_split": None,
    "engine.evaluate_teacher": False,
}
"""Values that turn off what is on by default. A run without it may have them: they say what is true of it."""


@dataclass(frozen=True)
class Part:
    """A part of a run, such as its schedule, and the settings that it reads."""

    name: str
    reads: frozenset[str]
    """Dotted keys, such as `optim.blr`."""
    present: bool = True
    """Whether the run has it."""
    instead: str = ""
    """Why the run has it not, and what to do, after `optim.blr=0.1 changes nothing`."""
    shadow: str = ""
    """The setting that takes its place. A value from the command line takes the place of one from a recipe."""


DEFAULTS = RunConfig()


def unread(config: RunConfig, parts: Sequence[Part]) -> dict[str, Part]:
    """Return the settings that differ from their default and that no part reads, each with an absent part that would.

    A setting that no part declares counts as read.
    """
    read = {key for part in parts if part.present for key in part.reads}
    found: dict[str, Part] = {}
    for part in parts:
        for key in sorted(part.reads - read):
            value = value_of(config, key)
            if value not in (default_of(key), OFF.get(key, default_of(key))):
                found.setdefault(key, part)
    return found


def check_effect(config: RunConfig, parts: Sequence[Part]) -> None:
    """Raise ConfigError for a setting that changes nothing in the run of `config`."""
    for key, part in unread(config, parts).items():
        raise ConfigError(f"{key}={value_of(config, key)!r} changes nothing {part.instead}")


def without(config: RunConfig, keys: Iterable[str]) -> RunConfig:
    """Return the configuration with these settings at their defaults."""
    for key in keys:
        section, _, name = key.rpartition(".")
        if section:
            changed = getattr(config, section).model_copy(update={name: default_of(key)})
            config = config.model_copy(update={section: changed})
        else:
            config = config.model_copy(update={name: default_of(key)})
    return config


def dump_decisive(
    config: RunConfig, but: Collection[str] = (), *, exclude_defaults: bool = False
) -> JsonDict:
    """Return the settings that the numbers of a run depend on, as JSON, without those in `but` (dotted keys)."""
    settings: JsonDict = config.model_dump(mode="json", exclude_defaults=exclude_defaults)
    for key in OUTSIDE | PLACES | set(but):
        section, _, name = key.rpartition(".")
        (settings.get(section, {}) if section else settings).pop(name, None)
    return {key: value for key, value in settings.items() if value != {}}


def value_of(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def default_of(key: str) -> Any:
    """Return the default of a dotted key."""
    section, _, name = key.rpartition(".")
    owner: BaseModel = getattr(DEFAULTS, section) if section else DEFAULTS
    return getattr(owner, name)
