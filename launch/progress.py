"""Measure how far a run is, from its log and its configuration alone."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.files import read_records
from ..models.errors import GraftError

INTERVALS = 5
"""How many of the last records give the speed."""


SCORES = {"top1": "top-1", "mask_ap": "mask AP", "box_ap": "box AP", "miou": "mIoU"}
"""What picks the best state of a run, and its words: in percent, or, of detectors and segmenters, of 1."""


@dataclass(frozen=True)
class Progress:
    """The progress of the run, or of the current stage of a recipe with stages."""

    stage: str = ""
    step: int = 0
    total_steps: int | None = None
    """None before the first record."""
    epoch: int = 0
    """Epochs that are behind."""
    epochs: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    """The seconds left in this stage: from now if it trains, else from its start."""
    metric: str = ""
    """What is scored, as in `SCORES`."""
    last_score: float | None = None
    best_score: float | None = None


def read_progress(folder: Path, training_since: float | None = None) -> Progress:
    """Return the progress according to the files of a run folder; all defaults before the first record.

    The present attempt has been training since that moment; None if no attempt runs.
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
    totals = [int(record["total_steps"]) for record in records if "total_steps" in record]
    total = totals[-1] if totals else None
    epoch, steps = (int(epochs[-1]["epoch"]) + 1, int(epochs[-1]["step"])) if epochs else (0, 0)
    pace = _seconds_a_step(records, epochs)
    # what the attempt has done since its last record; before its first one it starts, and has done nothing
    age = time.time() - written if training_since is not None and written > training_since else 0.0
    speeds = [float(record["images_per_second"]) for record in records if "images_per_second" in record]
    metric = next((each for each in SCORES if any(f"test_{each}" in record for record in epochs)), "")
    found = (record.get(f"test_ema_{metric}", record.get(f"test_{metric}")) for record in epochs)
    scores = [float(score) for score in found if score is not None]
    left = None if total is None or pace is None else max(0.0, (total - step) * pace - max(0.0, age))
    return Progress(
        stage=stage,
        step=step,
        total_steps=total,
        epoch=epoch,
        epochs=max(epoch, math.ceil(total * epoch / steps)) if total and steps else None,
        images_per_second=speeds[-1] if speeds else None,
        seconds_left=left,
        metric=metric,
        last_score=scores[-1] if scores else None,
        best_score=max(scores, default=None),
    )


def current_stage(folder: Path) -> Path:
    """Return the folder `<i>-<name>` of the last started stage, or of the first student; else the run folder itself."""
    stages = [
        (int(found[1]), path)
        for path in folder.glob("*-*")
        if (found := re.match(r"(\d+)-", path.name)) and (path / "config.yaml").is_file()
    ]
    if (folder / "config.yaml").is_file():
        return folder
    students = sorted(path.parent for path in folder.glob("*/config.yaml") if path.parent.name != "jobs")
    return max(stages)[1] if stages else next(iter(students), folder)


def _seconds_a_step(records: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> float | None:
    """Return the speed of the last intervals, or else of the last epoch."""
    intervals = [record for record in records if "n_parameters" not in record and "seconds" in record]
    chosen = intervals or epochs
    before = [0, *(int(record["step"]) for record in chosen)]
    pairs = list(zip(chosen, before, strict=False))[-INTERVALS:]
    timed = [(record, earlier) for record, earlier in pairs if "images_per_second" in record]
    steps = sum(int(record["step"]) - earlier for record, earlier in timed)
    seconds = sum(float(record.get("seconds", 0)) for record, _ in timed)
    return seconds / steps if steps > 0 and seconds > 0 else None
