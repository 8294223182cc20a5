"""A sweep: one recipe in many settings, each a cell with a run folder of its own.

OUTPUT_DIR/sweep.json             the axes, and the name and settings of each cell
OUTPUT_DIR/cells/layers=all,seed=0  an ordinary run folder
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints.atomic import write_file
from ...models.errors import CheckpointError, ConfigError
from .sweep_axes import MAX_CELLS, Axis, parse_axes, short_keys, shortened

SWEEP_FILE = "sweep.json"
NAME_LENGTH = 180
"""File systems allow 255 bytes, and temporary names beside a folder are longer than its own."""


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
        """Writes `sweep.json`. Raises WriteFailedError."""
        content = {
            "axes": [{"key": axis.key, "values": axis.values} for axis in self.axes],
            "cells": [{"name": cell.name, "settings": cell.settings} for cell in self.cells],
        }
        text = json.dumps(content, indent=1) + "\n"

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        write_file(self.folder / SWEEP_FILE, write, size=len(text))


def parse_sweep(words: Iterable[str], output_dir: Path) -> Sweep:
    """The sweep of the words after each `--sweep`; nothing is written.

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
        name = shortened(",".join(parts), NAME_LENGTH)
        settings = {axis.key: value for axis, (value, _) in zip(axes, places, strict=True)}
        cells.append(Cell(name, output_dir / "cells" / name, settings))
    return Sweep(output_dir, tuple(axes), tuple(cells))


def load_sweep(folder: Path) -> Sweep | None:
    """The sweep that was submitted to this folder; None where none was.

    Raises CheckpointError: its file is damaged.
    """
    path = folder / SWEEP_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        axes = tuple(Axis(str(axis["key"]), tuple(map(str, axis["values"]))) for axis in content["axes"])
        cells = tuple(
            Cell(str(cell["name"]), folder / "cells" / cell["name"], dict(cell["settings"]))
            for cell in content["cells"]
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}): submit the sweep again to another folder"
        ) from error
    return Sweep(folder, axes, cells)


def check_sweep(sweep: Sweep) -> None:
    """ConfigError where the folder holds another sweep, or a run of its own; the same sweep may go on."""
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
            "give the same --sweep words to go on with it, or another output_dir"
        )


def _words(sweep: Sweep) -> str:
    return " ".join(f"--sweep '{axis}'" for axis in sweep.axes)
