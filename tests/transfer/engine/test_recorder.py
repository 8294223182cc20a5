"""Records and their clocks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from graftvit.checkpoints.json_lines import read_records
from graftvit.transfer.engine.runlog import ProgressBar, Recorder, RunLog

RECORD = {"epoch": 0, "step": 1, "train_loss": 0.5, "lr": 0.1}


def recorder(folder: Path, writes: bool = True) -> Recorder:
    return Recorder(RunLog(folder / "log.jsonl"), [], ProgressBar(4, shown=False), writes=writes)


def test_the_clock_stands_still_while_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    under_test = recorder(tmp_path)
    under_test.start("interval")
    under_test.start("epoch")
    under_test.images(30)
    now[0] = 2.0
    with under_test.paused():
        now[0] = 102.0
    under_test.images(10)
    under_test.step(1, 0)
    now[0] = 104.0
    under_test.write("interval", RECORD)
    now[0] = 106.0
    under_test.write("epoch", RECORD)
    interval, epoch = read_records(tmp_path / "log.jsonl")
    assert (interval["seconds"], interval["images_per_second"]) == (4.0, 10.0)
    assert (epoch["seconds"], epoch["images_per_second"]) == (6.0, 6.7)


def test_waiting_is_a_share_of_the_clock_it_falls_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    under_test = recorder(tmp_path)
    under_test.communication = iter([0.5, None, 1.0]).__next__
    under_test.start("interval")
    under_test.start("epoch")
    for wait, work in ((1.0, 1.0), (0.0, 2.0)):
        with under_test.waiting():
            now[0] += wait
        with under_test.paused():
            now[0] += 100.0
        now[0] += work
        under_test.step(1, 0)
    under_test.write("interval", RECORD)
    now[0] += 4.0
    under_test.step(2, 0)
    under_test.write("interval", RECORD)
    under_test.write("epoch", RECORD)
    first, second, epoch = read_records(tmp_path / "log.jsonl")
    assert (first["seconds"], first["data_wait"], first["comm_wait"]) == (4.0, 0.25, 0.25)  # 2 x 0.5 s of 4 s
    assert (second["seconds"], second["data_wait"]) == (4.0, 0.0)
    assert "comm_wait" not in second  # nothing was timed in it
    assert (epoch["seconds"], epoch["data_wait"], epoch["comm_wait"]) == (
        8.0,
        0.125,
        0.281,
    )  # 3 x 0.75 s of 8 s


def test_a_record_without_a_timed_step_has_no_rate(tmp_path: Path) -> None:
    """A run that was stopped at the last step of an epoch writes the record of the epoch when it resumes."""
    under_test = recorder(tmp_path)
    under_test.start("interval")
    under_test.write("interval", RECORD)
    (record,) = read_records(tmp_path / "log.jsonl")
    assert record.keys() == {*RECORD, "seconds"}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    under_test = recorder(tmp_path, writes=False)
    under_test.start("interval")
    under_test.write("interval", RECORD)
    assert list(tmp_path.iterdir()) == []
