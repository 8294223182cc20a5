"""How far a run is, by its log and its configuration."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.progress import SCORES, read_progress
from graftvit.launch.summary import _numbers

TIMED = {"seconds": 20.0, "images_per_second": 64.0}
EPOCH = {"n_parameters": 5, "total_steps": 100, **TIMED}


def log(folder: Path, *records: dict[str, Any]) -> None:
    """A log whose last line is being written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text + '{"epoch": 9, "st')


def test_the_numbers_of_the_last_records_and_the_time_left(tmp_path: Path) -> None:
    assert read_progress(tmp_path).total_steps is None  # before the first record
    log(
        tmp_path,
        {"epoch": 0, "step": 0, "teacher_top1": 90.0},
        {"epoch": 0, "step": 10, **TIMED},
        {"epoch": 0, "step": 10, "test_top1": 40.0, "test_ema_top1": 50.0, **EPOCH},
        {"epoch": 1, "step": 20, **TIMED},
        {"epoch": 1, "step": 20, "test_top1": 41.0, "test_ema_top1": 45.0, **EPOCH},
        {"epoch": 2, "step": 25, **TIMED, "seconds": 10.0},
    )
    found = read_progress(tmp_path)
    assert (found.step, found.total_steps, found.epoch, found.epochs) == (25, 100, 2, 10)
    assert (found.metric, found.last_score, found.best_score) == ("top1", 45.0, 50.0)
    assert found.images_per_second == 64.0
    assert found.seconds_left == pytest.approx(150)


@pytest.mark.parametrize(
    ("metric", "words"), [("mask_ap", "mask AP"), ("box_ap", "box AP"), ("miou", "mIoU")]
)
def test_a_detector_or_segmenter_is_scored_by_what_picks_its_best_state(
    tmp_path: Path, metric: str, words: str
) -> None:
    others = {"test_box_ap": 0.9} if metric == "mask_ap" else {}
    for epoch, score in enumerate((0.25, 0.5, 0.4)):
        scored = {f"test_{metric}": score, **others}
        earlier = (tmp_path / "log.jsonl").read_text().splitlines()[:-1] if epoch else []
        log(tmp_path, *map(json.loads, earlier), {"epoch": epoch, "step": epoch + 1, **scored, **EPOCH})
    found = read_progress(tmp_path)
    assert (SCORES[found.metric], found.last_score, found.best_score) == (words, 0.4, 0.5)
    results = _numbers([json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[:-1]])
    assert (results[f"test_{metric}"], results[f"best_test_{metric}"]) == (0.4, 0.5)


def test_a_run_that_was_stopped_at_the_end_of_an_epoch_is_no_fast_one(tmp_path: Path) -> None:
    """It has timed no step."""
    cut = {"epoch": 1, "step": 20, "n_parameters": 5, "seconds": 0.001}
    log(tmp_path, {**EPOCH, "epoch": 0, "step": 10}, cut)
    found = read_progress(tmp_path)
    assert (found.images_per_second, found.seconds_left) == (64.0, pytest.approx(160))


def test_the_last_stage_that_has_begun_counts(tmp_path: Path) -> None:
    for stage, step, total in (("2-tune", 3, 4), ("1-fit", 9, 9)):
        log(tmp_path / stage, {"epoch": 0, "step": step, "n_parameters": 5, "total_steps": total})
    found = read_progress(tmp_path)
    assert (found.stage, found.step, found.total_steps) == ("2-tune", 3, 4)


AGE, LEFT = 400.0, 900.0
"""Seconds since the last record, and of the 90 steps that were left then."""


@pytest.mark.parametrize(("trains_for", "left"), [(None, LEFT), (AGE / 2, LEFT), (AGE + 100, LEFT - AGE)])
def test_the_time_left_is_counted_down_after_a_record_of_the_attempt_itself(
    trains_for: float | None, left: float, tmp_path: Path
) -> None:
    log(tmp_path, {**EPOCH, "epoch": 0, "step": 10, "seconds": 100.0})
    now = time.time()
    os.utime(tmp_path / "log.jsonl", (now - AGE,) * 2)
    since = None if trains_for is None else now - trains_for
    assert read_progress(tmp_path, training_since=since).seconds_left == pytest.approx(left, abs=60)
