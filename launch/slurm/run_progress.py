"""Measure how far a run is, from its log and its configuration alone."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.json_lines import read_records
from ...models.errors import GraftError
from ..load_config import load_config

INTERVALS = 5
"""How many of the last records give the speed."""


@dataclass(frozen=True)
class Progress:
    """The progress of the run, or of the current stage of a recipe with stages."""

    stage: str = ""
    step: int = 0
    total_steps: int | None = None
    """None before it can be known: at the end of the first epoch, or at once with `optim.max_steps`."""
    epoch: int = 0
    """Epochs that are behind."""
    epochs: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    """The seconds left in this stage: from now if it trains, else from its start."""
    last_top1: float | None = None
    best_top1: float | None = None


def read_progress(folder: Path, training_since: float | None = None) -> Progress:
    """Return the progress according to the files of a run folder; all defaults before the first record.

    Args:
        folder: The run folder.
        training_since: When the present attempt started to train; None if no attempt runs.
    """
    inner = current_stage(folder)
    stage = "" if inner == folder else inner.name
    path = inner / "log.jsonl"
    try:
        records = [record for record in read_records(path) if isinstance(record.get("step"), int)]
        written = path.stat().st_mtime
    except (OSError, GraftError):
        return Progress(stage)
    epochs = [record for record in records if "n_parameters" in record]
    step = max((int(record["step"]) for record in records), default=0)
    limit, total = _length(inner, epochs)
    pace = _seconds_a_step(records, epochs)
    # what the attempt has done since its last record; before its first one it starts, and has done nothing
    age = time.time() - written if training_since is not None and written > training_since else 0.0
    left = None if total is None or pace is None else max(0.0, (total - step) * pace - max(0.0, age))
    speeds = [record["images_per_second"] for record in records if "images_per_second" in record]
    scores = [float(value) for record in epochs if (value := _top1(record)) is not None]
    return Progress(
        stage=stage,
        step=step,
        total_steps=total,
        epoch=int(epochs[-1]["epoch"]) + 1 if epochs else 0,
        epochs=limit,
        images_per_second=float(speeds[-1]) if speeds else None,
        seconds_left=0.0 if total is not None and step >= total else left,
        last_top1=scores[-1] if scores else None,
        best_top1=max(scores, default=None),
    )


def current_stage(folder: Path) -> Path:
    """Return the folder `<i>-<name>` of the last started stage; the run folder itself without stages."""
    stages = [
        (int(found[1]), path)
        for path in folder.glob("*-*")
        if (found := re.match(r"(\d+)-", path.name)) and (path / "config.yaml").is_file()
    ]
    return folder if (folder / "config.yaml").is_file() or not stages else max(stages)[1]


def _length(folder: Path, epochs: list[dict[str, Any]]) -> tuple[int | None, int | None]:
    """Return epochs and steps of the whole run, as far as they can be known."""
    try:
        optim = load_config(folder).optim
    except GraftError:
        return None, None
    if optim.max_steps is not None:
        return None, optim.max_steps
    if not epochs:
        return optim.epochs, None
    before = epochs[-2]["step"] if len(epochs) > 1 else 0
    left = optim.epochs - epochs[-1]["epoch"] - 1
    return optim.epochs, int(epochs[-1]["step"] + left * (epochs[-1]["step"] - before))


def _seconds_a_step(records: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> float | None:
    """Return the speed of the last intervals, or else of the last epoch."""
    intervals = [record for record in records if "n_parameters" not in record and "seconds" in record]
    chosen = intervals or epochs
    before = [0, *(int(record["step"]) for record in chosen)]
    steps = sum(
        int(record["step"]) - earlier
        for record, earlier in list(zip(chosen, before, strict=False))[-INTERVALS:]
    )
    seconds = sum(float(record.get("seconds", 0)) for record in chosen[-INTERVALS:])
    return seconds / steps if steps > 0 and seconds > 0 else None


def _top1(record: dict[str, Any]) -> Any:
    return record.get("test_ema_top1", record.get("test_top1"))
