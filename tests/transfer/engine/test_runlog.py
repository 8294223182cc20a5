"""log.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.models.errors import RunFailedError
from graftvit.transfer.engine.runlog import RunLog, read_log


def test_records_come_back_with_every_bit(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    record = {"step": 3, "train_loss": 0.1 + 0.2, "lr": 1e-17}
    log.append(record)
    assert read_log(log.path) == [record]
    assert log.records == 1


def test_keep_drops_what_came_after_and_a_cut_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "train')
    again = RunLog(log.path)
    again.keep(3)
    again.append({"step": 9})
    assert [record["step"] for record in read_log(log.path)] == [0, 1, 2, 9]
    assert again.records == 4
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_keep_of_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.keep(5)
    assert log.records == 0
    assert log.path.read_text() == ""


def test_a_reader_stops_at_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_log(path) == [{"step": 1}]


def test_an_unwritable_log_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="cannot be written: No such file or directory") as caught:
        RunLog(tmp_path / "absent" / "log.jsonl").append({"step": 1})
    assert caught.value.exit_code == 1


def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(RunFailedError, match="No space left on device"):
        RunLog(Path("/dev/full")).append({"step": 1})
