"""What a cell of a sweep runs: its whole configuration, for the ordinary command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import ConfigError
from ...models.plain_yaml import write_yaml
from ...transfer.config import RunConfig
from ..config import Setting, dump_config, load_config, load_stages, parse_setting, read_recipe
from ..fields import leaf_of
from .sweep import Cell, Sweep


def cell_configs(
    sweep: Sweep, recipe: str | Path | None, overrides: Iterable[Setting] = ()
) -> dict[str, str]:
    """Name of each cell -> the YAML of all its settings, which `graftvit train` runs; a recipe's stages stay stages.

    Raises ConfigError: the settings of a cell are not valid, or an override is one that is swept.
    """
    given = list(overrides)
    _check_once(sweep, given)
    return {cell.name: _cell_config(cell, recipe, given) for cell in sweep.cells}


def first_config(sweep: Sweep, recipe: str | Path | None, overrides: Sequence[Setting]) -> RunConfig:
    """What the first cell runs, or its first stage."""
    own = _settings(sweep.cells[0], overrides)
    stages = [] if recipe is None else load_stages(recipe, own)
    return stages[0].config if stages else load_config(recipe, own)


def as_text(setting: Setting) -> str:
    """The text of the command line that `parse_setting` reads as the value of this setting."""
    value: Any = setting.value
    if isinstance(value, str) and parse_setting(setting.key, value, setting.origin).value == value:
        return value
    if value is None and type(None) in leaf_of(setting.key).kinds:
        return "none"
    return json.dumps(value, ensure_ascii=False)


def _cell_config(cell: Cell, recipe: str | Path | None, overrides: Sequence[Setting]) -> str:
    own = _settings(cell, overrides)
    if recipe is None or not read_recipe(recipe).stages:
        return dump_config(load_config(recipe, own))
    stages = load_stages(recipe, own)
    return write_yaml(
        {"stages": [{"name": stage.name, **stage.config.model_dump(mode="json")} for stage in stages]}
    )


def _settings(cell: Cell, overrides: Sequence[Setting]) -> list[Setting]:
    own = [parse_setting(key, value, origin=f"--sweep {key}") for key, value in cell.settings.items()]
    return [*overrides, *own, Setting("output_dir", str(cell.folder), "output_dir")]


def _check_once(sweep: Sweep, overrides: Sequence[Setting]) -> None:
    for setting in overrides:
        for axis in sweep.axes:
            if setting.key == axis.key or setting.key.startswith(f"{axis.key}."):
                raise ConfigError(
                    f"{setting.origin} sets what --sweep {axis.key} goes through: leave one of the two out"
                )
