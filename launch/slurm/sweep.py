"""Expand a sweep: one recipe in many settings, each a cell with its own run folder.

    OUTPUT_DIR/sweep.json               the axes, and the name and settings of each cell
    OUTPUT_DIR/cells/layers=all,seed=0  an ordinary run folder

`--sweep` says which values a setting takes, and what they are called in a folder name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import write_text
from ...checkpoints.files import LONGEST_NAME, read_json, safe_name
from ...models.errors import CheckpointError, ConfigError
from ...models.plain_yaml import write_yaml
from ...transfer.config import RunConfig
from ..fields import find_key, leaf_of, leaves, unknown
from ..load_config import Setting, dump_config, load_config, load_stages, parse_setting

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    """`layers=first-6,seed=0`: safe as a file name, different for every cell."""
    folder: Path
    """The run folder."""
    settings: dict[str, str]
    """Dotted key -> value, as a text of the command line."""


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep, in the order of the array: the last axis changes fastest."""

    folder: Path
    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]

    def save(self) -> None:
        """Write `sweep.json`. Raises WriteFailedError."""
        content = {
            "axes": [{"key": axis.key, "values": axis.values} for axis in self.axes],
            "cells": [{"name": cell.name, "settings": cell.settings} for cell in self.cells],
        }
        write_text(self.folder / SWEEP_FILE, json.dumps(content, indent=1) + "\n")


def parse_sweep(words: Iterable[str], output_dir: Path) -> Sweep:
    """Parse the words after each `--sweep`; write nothing.

    Raises ConfigError: as `parse_axes`, or there are too many cells for one array.
    """
    axes = parse_axes(words)
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_CELLS:
        sizes = " x ".join(str(len(axis.values)) for axis in axes)
        raise ConfigError(f"--sweep makes {sizes} = {count:,} cells, but a sweep has {MAX_CELLS} at most")
    keys = short_keys(axes)
    cells = []
    for places in itertools.product(*(zip(axis.values, axis.labels(), strict=True) for axis in axes)):
        parts = (f"{key}={label}" for key, (_, label) in zip(keys, places, strict=True))
        name = shortened(",".join(parts), LONGEST_NAME)
        settings = {axis.key: value for axis, (value, _) in zip(axes, places, strict=True)}
        cells.append(Cell(name, output_dir / "cells" / name, settings))
    return Sweep(output_dir, tuple(axes), tuple(cells))


def load_sweep(folder: Path) -> Sweep | None:
    """Return the sweep that was submitted to this folder; None without one.

    Raises CheckpointError: its file is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        axes = tuple(Axis(str(axis["key"]), tuple(map(str, axis["values"]))) for axis in content["axes"])
        names = [
            safe_name(str(cell["name"]), str(path), refusal=CheckpointError) for cell in content["cells"]
        ]
        cells = tuple(
            Cell(name, folder / "cells" / name, dict(cell["settings"]))
            for name, cell in zip(names, content["cells"], strict=True)
        )
    except (CheckpointError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}): submit the sweep again to another folder"
        ) from error
    return Sweep(folder, axes, cells)


def check_sweep(sweep: Sweep) -> None:
    """Raise ConfigError if the folder holds another sweep or a run; the same sweep may be submitted again."""
    before = load_sweep(sweep.folder)
    if before is None:
        if (sweep.folder / "log.jsonl").exists():
            raise ConfigError(
                f"output_dir={sweep.folder} holds a run that is no sweep: give the sweep another output_dir"
            )
        return
    if before.cells != sweep.cells:
        raise ConfigError(
            f"output_dir={sweep.folder} holds another sweep ({_words(before)}): "
            "give the same --sweep words to resume it, or another output_dir"
        )


def _words(sweep: Sweep) -> str:
    return " ".join(f"--sweep '{axis}'" for axis in sweep.axes)


MAX_CELLS = 1000
"""Slurm takes arrays of up to 1000 jobs unless the site says otherwise (MaxArraySize=1001)."""
EXAMPLE = "as in --sweep seed=0..4 or --sweep 'transfer.layers=first:6,[0,3,5],all'"
CLOSING = {")": "(", "]": "[", "}": "{"}
RANGE = re.compile(r"([-+]?[0-9]{1,18})\.\.([-+]?[0-9]{1,18})")
LABEL_LENGTH = 40


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as texts of the command line."""

    key: str
    values: tuple[str, ...]

    def labels(self) -> list[str]:
        """Return the values as parts of a file name, all different, also without upper and lower case."""
        slugs = [_slug(value) for value in self.values]
        folded = [slug.casefold() for slug in slugs]
        return [
            slug if 0 < len(slug) <= LABEL_LENGTH and folded.count(slug.casefold()) == 1 else _hashed(slug, value)
            for slug, value in zip(slugs, self.values, strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.key}={','.join(_quoted(self.key, value) for value in self.values)}"


def parse_axes(words: Iterable[str]) -> list[Axis]:
    """Parse `transfer.layers=first:6,all` and `seed=0..4`, each as an axis, in the given order.

    Commas separate values, `a..b` is all whole numbers from a to b, and a value that contains commas is written in
    square brackets.

    Raises ConfigError: a key is unknown, is there twice or cannot be swept, or a list is empty or malformed.
    """
    axes: list[Axis] = []
    for word in words:
        axis = _parse_axis(word)
        for other in axes:
            _check_apart(axis.key, other.key)
        axes.append(axis)
    if not axes:
        raise ConfigError(f"--sweep needs a setting and its values, {EXAMPLE}")
    return axes


def short_keys(axes: Sequence[Axis]) -> list[str]:
    """Return the last part of each key, or the whole key if two last parts are equal."""
    last = [_slug(axis.key.rpartition(".")[2]) for axis in axes]
    return [name if last.count(name) == 1 else _slug(axis.key) for name, axis in zip(last, axes, strict=True)]


def shortened(name: str, length: int) -> str:
    """Return the name; if it is longer than `length`, replace its end by a hash of all of it."""
    return name if len(name) <= length else f"{name[: length - 9]}~{_digest(name)}"


def _parse_axis(word: str) -> Axis:
    name, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"--sweep {word!r} has no values; write key=value,value,..., {EXAMPLE}")
    key = find_key(name.strip())
    if key is None:
        raise unknown(name.strip(), where="--sweep")
    if key == "output_dir":
        raise ConfigError("--sweep output_dir: each cell has a folder of its own below the one output_dir")
    values = _values(key, text)
    # equal values (1e-3 and 0.001) would be two cells of one run
    seen: list[object] = []
    for value in values:
        parsed = parse_setting(key, value, origin=key).value
        if parsed in seen:
            raise ConfigError(f"--sweep {name}: the value {value!r} is given twice")
        seen.append(parsed)
    return Axis(key, tuple(values))


def _check_apart(key: str, other: str) -> None:
    if key == other:
        raise ConfigError(f"--sweep {key} is given twice; put all its values into one list")
    if key.startswith((f"{other}.", f"{other}[")) or other.startswith((f"{key}.", f"{key}[")):
        raise ConfigError(f"--sweep {key} and --sweep {other} set the same thing; give one of the two")


def _values(key: str, text: str) -> list[str]:
    values: list[str] = []
    for item in _split(key, text):
        if not item:
            raise ConfigError(f"--sweep {key}={text!r} has an empty value; separate values by one comma each")
        found = RANGE.fullmatch(item)
        if found:
            values += _range(key, item, int(found[1]), int(found[2]))
        elif ".." in item and re.fullmatch(r"[-+0-9.]*[0-9][-+0-9.]*", item):
            raise ConfigError(f"--sweep {key}: {item!r} is no range; write whole numbers, as in 0..4")
        else:
            values.append(_unwrapped(key, item))
    if len(values) > MAX_CELLS:
        raise ConfigError(f"--sweep {key} has {len(values):,} values, but a sweep has {MAX_CELLS} at most")
    return values


def _range(key: str, item: str, first: int, last: int) -> list[str]:
    if first > last:
        raise ConfigError(f"--sweep {key}: the range {item!r} is empty; write {last}..{first}")
    if last - first >= MAX_CELLS:
        raise ConfigError(f"--sweep {key}: the range {item!r} has more than {MAX_CELLS} values")
    return [str(number) for number in range(first, last + 1)]


def _split(key: str, text: str) -> list[str]:
    """Split at the commas outside brackets."""
    items, open_brackets = [""], ""
    for letter in text:
        if letter == "," and not open_brackets:
            items.append("")
            continue
        items[-1] += letter
        if letter in CLOSING.values():
            open_brackets += letter
        elif letter in CLOSING:
            if not open_brackets.endswith(CLOSING[letter]):
                raise ConfigError(f"--sweep {key}={text!r}: {letter!r} closes a bracket that was not opened")
            open_brackets = open_brackets[:-1]
    if open_brackets:
        raise ConfigError(f"--sweep {key}={text!r}: the bracket {open_brackets[-1]!r} is not closed")
    return [item.strip() for item in items]


def _unwrapped(key: str, item: str) -> str:
    """Return a value without brackets that only keep its commas; inside a mapping they make a list."""
    inner = item[1:-1].strip()
    wraps = item[0] == "[" and item[-1] == "]" and inner and inner[0] != "["
    if not wraps or key not in leaves():
        return item
    depth = 0
    for letter in inner:  # `[ab].*[cd]` is not a value in brackets
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            return item
    return inner


def _quoted(key: str, value: str) -> str:
    several = len(_split(key, value)) > 1 or RANGE.fullmatch(value)
    return f"[{value}]" if several else value


def _slug(text: str) -> str:
    """Return letters, digits, points, dashes; a dash in place of anything else."""
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    return slug.strip("-") if slug != text else slug


def _hashed(slug: str, text: str) -> str:
    # no slug has a tilde: so this name differs from every plain name
    return f"{slug[:LABEL_LENGTH]}~{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def cell_configs(
    sweep: Sweep, recipe: str | Path | None, overrides: Iterable[Setting] = ()
) -> dict[str, str]:
    """Name of each cell -> the YAML of all its settings, which `graftvit train` runs; a recipe's stages stay stages.

    Raises ConfigError: the settings of a cell are not valid, or an override is one that is swept.
    """
    given = list(overrides)
    _check_once(sweep, given)
    return {cell.name: frozen_text(recipe, cell_settings(cell, given)) for cell in sweep.cells}


def run_configs(recipe: str | Path | None, settings: Sequence[Setting]) -> list[RunConfig]:
    """Return the configuration of a run, or of each of its stages. Raises ConfigError."""
    stages = [] if recipe is None else load_stages(recipe, settings)
    return [stage.config for stage in stages] or [load_config(recipe, settings)]


def frozen_text(recipe: str | Path | None, settings: Sequence[Setting]) -> str:
    """Return the YAML of all settings of a run; stages stay stages. Raises ConfigError."""
    stages = [] if recipe is None else load_stages(recipe, settings)
    if not stages:
        return dump_config(load_config(recipe, settings))
    return write_yaml(
        {"stages": [{"name": stage.name, **stage.config.model_dump(mode="json")} for stage in stages]}
    )


def as_text(setting: Setting) -> str:
    """Return the text of the command line that `parse_setting` reads as the value of this setting."""
    value: Any = setting.value
    if isinstance(value, str) and parse_setting(setting.key, value, setting.origin).value == value:
        return value
    if value is None and type(None) in leaf_of(setting.key).kinds:
        return "none"
    return json.dumps(value, ensure_ascii=False)


def cell_settings(cell: Cell, overrides: Sequence[Setting]) -> list[Setting]:
    """Return the settings of the run of a cell."""
    own = [parse_setting(key, value, origin=f"--sweep {key}") for key, value in cell.settings.items()]
    return [*overrides, *own, Setting("output_dir", str(cell.folder), "output_dir")]


def _check_once(sweep: Sweep, overrides: Sequence[Setting]) -> None:
    for setting in overrides:
        for axis in sweep.axes:
            if setting.key == axis.key or setting.key.startswith(f"{axis.key}."):
                raise ConfigError(
                    f"{setting.origin} sets what --sweep {axis.key} goes through: leave one of the two out"
                )
