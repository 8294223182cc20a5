"""Expand a sweep: one recipe in many settings, each a cell with its own run folder.

    OUTPUT_DIR/sweep.json               the settings of each cell
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

from ..checkpoints.atomic import write_text
from ..checkpoints.files import LONGEST_NAME, read_json, safe_name
from ..models.errors import CheckpointError, ConfigError
from ..models.plain_yaml import write_yaml
from ..transfer.config import RunConfig
from .fields import find_key, leaves, unknown
from .load_config import Setting, dump_config, load_config, load_stages, load_students, parse_setting
from .say import hint

SWEEP_FILE = "sweep.json"
MAX_CELLS = 1000
"""Slurm takes arrays of up to 1000 jobs unless the site says otherwise (MaxArraySize=1001)."""
EXAMPLE = "as in --sweep seed=0..4 or --sweep 'transfer.layers=first:6,[0,3,5],all'"
RANGE = re.compile(r"([-+]?[0-9]{1,18})\.\.([-+]?[0-9]{1,18})")
LABEL_LENGTH = 40


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep, in the order of the array: the last setting changes fastest."""

    folder: Path
    cells: dict[Path, dict[str, str]]
    """Run folder -> dotted key -> value, as a text of the command line."""

    def save(self) -> None:
        """Write `sweep.json`. Raises WriteFailedError."""
        cells = [{"name": cell.name, "settings": settings} for cell, settings in self.cells.items()]
        write_text(self.folder / SWEEP_FILE, json.dumps({"cells": cells}, indent=1) + "\n")


def parse_sweep(words: Iterable[str], output_dir: Path) -> Sweep:
    """Parse the words after each `--sweep`, such as `transfer.layers=first:6,all` and `seed=0..4`; write nothing.

    Commas separate values, `a..b` is all whole numbers from a to b, and a value that contains commas is written in
    square brackets.

    Raises ConfigError: a key is unknown, is there twice or cannot be swept, a list is empty or malformed, or there are
    too many cells for one array.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        key, values = _parse_axis(word)
        for other in axes:
            if key == other or _inside(key, other) or _inside(other, key):
                raise ConfigError(
                    f"--sweep {key} and --sweep {other} set the same thing; give one of the two"
                )
        axes[key] = values
    if (count := math.prod(map(len, axes.values()))) > MAX_CELLS:
        raise ConfigError(f"--sweep makes {count:,} cells, but a sweep has {MAX_CELLS} at most")
    last = [_slug(key.rpartition(".")[2]) for key in axes]
    short = [name if last.count(name) == 1 else _slug(key) for name, key in zip(last, axes, strict=True)]
    names = (
        [f"{key}={label}" for label in _labels(values)]
        for key, values in zip(short, axes.values(), strict=True)
    )
    cells = {}
    for parts, chosen in zip(itertools.product(*names), itertools.product(*axes.values()), strict=True):
        name = ",".join(parts)
        if len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 9]}~{_digest(name)}"
        cells[output_dir / "cells" / name] = dict(zip(axes, chosen, strict=True))
    return Sweep(output_dir, cells)


def load_sweep(folder: Path) -> Sweep | None:
    """Return the sweep that was submitted to this folder; None without one.

    Raises CheckpointError: its file is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.exists():
        return None
    try:
        cells = {
            folder / "cells" / safe_name(str(cell["name"]), str(path), refusal=CheckpointError): dict(
                cell["settings"]
            )
            for cell in [*read_json(path)["cells"]]
        }
        if len({tuple(settings) for settings in cells.values()}) != 1:
            raise KeyError("cells")
    except (CheckpointError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}): submit the sweep again to another folder"
        ) from error
    return Sweep(folder, cells)


def check_sweep(sweep: Sweep) -> None:
    """Raise ConfigError if the folder holds another sweep or a run; the same sweep may be submitted again."""
    before = load_sweep(sweep.folder)
    if before is None and (sweep.folder / "log.jsonl").exists():
        raise ConfigError(
            f"output_dir={sweep.folder} holds a run that is no sweep: give the sweep another output_dir"
        )
    if before is not None and before.cells != sweep.cells:
        raise ConfigError(
            f"output_dir={sweep.folder} holds another sweep: `{hint('jobs', 'resume', sweep.folder)}` resumes it; give "
            "this one another output_dir"
        )


def _inside(key: str, other: str) -> bool:
    return key.startswith((f"{other}.", f"{other}["))


def _labels(values: Sequence[str]) -> list[str]:
    """Return the values as parts of a file name, all different, also without upper and lower case."""
    slugs = [_slug(value) for value in values]
    folded = [slug.casefold() for slug in slugs]
    return [
        # no slug has a tilde: so a name with a hash differs from every plain name
        slug if 0 < len(slug) <= LABEL_LENGTH and folded.count(slug.casefold()) == 1
        else f"{slug[:LABEL_LENGTH]}~{_digest(value)}"
        for slug, value in zip(slugs, values, strict=True)
    ]  # fmt: skip


def _parse_axis(word: str) -> tuple[str, list[str]]:
    name, equals, text = word.partition("=")
    if not equals:
        raise ConfigError(f"--sweep {word!r} has no values; write key=value,value,..., {EXAMPLE}")
    key = find_key(name.strip())
    if key is None:
        raise unknown(name.strip(), where="--sweep")
    if key == "output_dir":
        raise ConfigError("--sweep output_dir: each cell has a folder of its own below the one output_dir")
    items = _split(text)
    if items is None or "" in items:
        raise ConfigError(
            f"--sweep {key}={text!r} has an empty value, or a bracket without the other; {EXAMPLE}"
        )
    values = [value for item in items for value in _values(key, item)]
    seen: list[object] = []
    for value in values:  # equal ones (1e-3 and 0.001) would be two cells of one run
        parsed = parse_setting(key, value, origin=key).value
        if parsed in seen:
            raise ConfigError(f"--sweep {name}: the value {value!r} is given twice")
        seen.append(parsed)
    return key, values


def _values(key: str, item: str) -> Iterable[str]:
    """Return the numbers of a range, or the one value, without brackets that only keep its commas."""
    if found := RANGE.fullmatch(item):
        numbers = range(int(found[1]), int(found[2]) + 1)
        if not 0 < len(numbers) <= MAX_CELLS:
            raise ConfigError(
                f"--sweep {key}: the range {item!r} has {len(numbers):,} values; give 1 to {MAX_CELLS}"
            )
        return map(str, numbers)
    if ".." in item and re.fullmatch(r"[-+0-9.]*[0-9][-+0-9.]*", item):
        raise ConfigError(f"--sweep {key}: {item!r} is no range; write whole numbers, as in 0..4")
    inner = item[1:-1].strip()
    # inside a mapping they make a list, and `[ab].*[cd]` is not a value in brackets
    wraps = item[0] == "[" and item[-1] == "]" and inner and inner[0] != "[" and _split(inner) is not None
    return [inner if wraps and key in leaves() else item]


def _split(text: str) -> list[str] | None:
    """Split at the commas outside of brackets; None if one is not closed or not opened."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    return None if depth else [item.strip() for item in items]


def _slug(text: str) -> str:
    """Return letters, digits, points, dashes; a dash in place of anything else."""
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    return slug.strip("-") if slug != text else slug


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def cell_configs(
    sweep: Sweep, recipe: str | Path | None, overrides: Sequence[Setting] = ()
) -> dict[Path, str]:
    """Run folder -> the YAML of all its settings, which `graftvit train` runs; a recipe's stages stay stages.

    Raises ConfigError: the settings of a cell are not valid, or an override is one that is swept.
    """
    for setting in overrides:
        for key in next(iter(sweep.cells.values())):
            if setting.key == key or _inside(setting.key, key):
                raise ConfigError(
                    f"{setting.origin} sets what --sweep {key} goes through: leave one of the two out"
                )
    return {cell: frozen_text(recipe, cell_settings(sweep, cell, overrides)) for cell in sweep.cells}


def cell_settings(sweep: Sweep, cell: Path, overrides: Sequence[Setting]) -> list[Setting]:
    """Return the settings of the run of a cell."""
    own = [parse_setting(key, value, origin=f"--sweep {key}") for key, value in sweep.cells[cell].items()]
    return [*overrides, *own, Setting("output_dir", str(cell), "output_dir")]


def run_configs(recipe: str | Path | None, settings: Sequence[Setting]) -> list[RunConfig]:
    """Return the configuration of a run, or of each of its stages or students. Raises ConfigError."""
    stages = [stage.config for stage in load_stages(recipe, settings)]
    return stages or [*load_students(recipe, settings).values()] or [load_config(recipe, settings)]


def frozen_text(recipe: str | Path | None, settings: Sequence[Setting]) -> str:
    """Return the YAML of all settings of a run; stages stay stages, and students students. Raises ConfigError."""
    stages, students = load_stages(recipe, settings), load_students(recipe, settings)
    if students:
        return write_yaml(
            {"students": {name: config.model_dump(mode="json") for name, config in students.items()}}
        )
    if not stages:
        return dump_config(load_config(recipe, settings))
    return write_yaml(
        {"stages": [{"name": stage.name, **stage.config.model_dump(mode="json")} for stage in stages]}
    )
