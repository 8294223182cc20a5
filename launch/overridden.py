"""Leave out inherited settings that stronger ones deprive of their effect.

A recipe may set mixup and a user another mode: what the user did not type, and does nothing any more, has its default.
What the user typed stays, and the run refuses it if it changes nothing (`transfer/effect.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ..models.errors import ConfigError
from ..transfer.config import RunConfig
from ..transfer.effect import OUTSIDE, Part
from .fields import leaf_of

if TYPE_CHECKING:
    from .load_config import Setting

Validate = Callable[[Sequence["Setting"]], RunConfig]
DECIDES_NOTHING = OUTSIDE | {
    "engine.device",
    "seed",
    "data.data_path",
    "data.stage",
    "data.batch_size",
    "data.num_classes",
}
"""Settings that take the effect of no other; they are not worth loading torch for."""


def without_overridden(settings: Sequence[Setting], validate: Validate) -> list[Setting]:
    """Return the settings without those that a stronger layer leaves no effect; each layer follows a weaker one."""
    kept: list[Setting] = []
    for _, group in itertools.groupby(settings, key=lambda setting: setting.layer):
        above = list(group)
        if kept and not {key_of(setting) for setting in above} <= DECIDES_NOTHING:
            kept = _beside(kept, above, validate)
        kept += above
    return kept


def _beside(below: list[Setting], above: list[Setting], validate: Validate) -> list[Setting]:
    """Return the settings of `below` that keep their effect under those of `above`."""
    typed = {key_of(setting) for setting in above}
    try:
        shadows = _shadows_of(typed, validate([*below, *above])) - typed
        below = _without(below, shadows)
        after = unread_of(validate([*below, *above]))
    except ConfigError:  # a stronger layer may replace what is not valid
        return below
    gone = after.keys() - typed
    return _without(below, gone - _unread_before(below, validate)) if gone else below


def _shadows_of(typed: Collection[str], config: RunConfig) -> set[str]:
    """Return the settings that take the place of typed ones, whatever value these have."""
    return {part.shadow for part in _parts_of(config) if not part.present and part.reads & set(typed)} - {""}


def _unread_before(settings: Sequence[Setting], validate: Validate) -> set[str]:
    try:
        return set(unread_of(validate(settings)))
    except ConfigError:
        return set()


def read_elsewhere(settings: Sequence[Setting], stage: str, configs: dict[str, RunConfig]) -> list[Setting]:
    """Return the settings of a stage without those for all stages that change others and not this one."""
    own = unread_of(configs[stage]).keys()
    if not own:
        return list(settings)
    everywhere = set(own).intersection(*(unread_of(config) for config in configs.values()))
    return [
        setting
        for setting in settings
        if setting.stage == stage or setting.layer == stage or key_of(setting) not in own - everywhere
    ]


def unread_of(config: RunConfig) -> dict[str, Part]:
    """Return the settings that change nothing in the run of `config`."""
    from ..transfer.effect import unread

    return unread(config, _parts_of(config))


def _parts_of(config: RunConfig) -> list[Part]:
    from ..transfer.engine.modes import mode_of
    from ..transfer.engine.run_parts import run_parts

    return run_parts(mode_of(config))


def key_of(setting: Setting) -> str:
    """Return the key of the setting, or of the mapping that it is in."""
    return leaf_of(setting.key).key


def _without(settings: Sequence[Setting], keys: Collection[str]) -> list[Setting]:
    return [setting for setting in settings if key_of(setting) not in keys]
