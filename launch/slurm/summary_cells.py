"""How far a cell of a sweep is, and what it measured: read from the files of its run folder alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...models.errors import GraftError
from ...transfer.config import RunConfig
from ...transfer.engine.runlog import read_log
from ..config import load_config
from .files import JobFolder
from .progress import current_stage
from .sweep import Cell

State = Literal["done", "failed", "unfinished", "not begun"]
ACCURACIES = ("test_top1", "test_ema_top1")
LOSS = "train_loss"


@dataclass(frozen=True)
class CellResult:
    """A cell as its run folder shows it."""

    cell: Cell
    state: State
    why: str = ""
    """How it failed, or how far it is."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Of a cell that is done: test_top1 and test_ema_top1 in percent, last and best_, and the last train_loss."""


def read_cell(cell: Cell) -> CellResult:
    """A cell is done when its last epoch is in the log and its student is written, failed when its last attempt
    said so, and otherwise unfinished. Of a recipe with stages, the stage that it came to counts."""
    run, why = current_stage(cell.folder), ""
    begun = (run / "config.yaml").is_file()
    if begun:
        epochs = _epochs(run / "log.jsonl")
        try:
            config = load_config(run)
        except GraftError as error:
            why = _one_line(str(error))
        else:
            if (cell.folder / "student").is_dir() and _complete(config, epochs):
                return CellResult(cell, "done", numbers=_numbers(epochs))
            why = _progress(config, epochs)
            why = why if run == cell.folder else f"stage {run.name}, {why}"
    attempts = JobFolder(cell.folder).attempts()
    if attempts and attempts[-1].outcome == "failed":
        return CellResult(cell, "failed", _one_line(attempts[-1].why))
    return CellResult(cell, "unfinished" if begun or attempts else "not begun", why)


def _epochs(path: Path) -> list[dict[str, Any]]:
    """The records at the end of an epoch; the others have no number of parameters."""
    try:
        records = read_log(path)
    except (OSError, ValueError):
        return []
    return [record for record in records if "n_parameters" in record]


def _complete(config: RunConfig, epochs: list[dict[str, Any]]) -> bool:
    if not epochs:
        return False
    if config.optim.max_steps is not None:
        return bool(epochs[-1]["step"] >= config.optim.max_steps)
    return bool(epochs[-1]["epoch"] + 1 >= config.optim.epochs)


def _progress(config: RunConfig, epochs: list[dict[str, Any]]) -> str:
    if config.optim.max_steps is not None:
        return f"step {epochs[-1]['step'] if epochs else 0} of {config.optim.max_steps}"
    return f"epoch {epochs[-1]['epoch'] + 1 if epochs else 0} of {config.optim.epochs}"


def _numbers(epochs: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ACCURACIES:
        values = [float(record[name]) for record in epochs if name in record]
        if values:
            found |= {name: values[-1], f"best_{name}": max(values)}
    if LOSS in epochs[-1]:
        found[LOSS] = float(epochs[-1][LOSS])
    return found


def _one_line(text: str, length: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
