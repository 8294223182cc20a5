"""log.jsonl."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from graftvit.checkpoints.json_lines import read_records
from graftvit.models.errors import RunFailedError
from graftvit.transfer.engine.runlog import RunLog


def test_records_come_back_with_every_bit(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    record = {"step": 3, "train_loss": 0.1 + 0.2, "lr": 1e-17}
    log.append(record)
    assert read_records(log.path) == [record]
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
    assert [record["step"] for record in read_records(log.path)] == [0, 1, 2, 9]
    assert again.records == 4
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_keep_of_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.keep(5)
    assert log.records == 0
    assert log.path.read_text() == ""


def test_a_reader_leaves_out_a_cut_line_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st{"step": 3}\n7\n{"step": 4}\n{"st')
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"step": 1}, {"step": 4}]
    assert caplog.messages == [f"{path}: left out lines 2, 3, 5, which are no whole records"]


def test_a_cut_line_among_the_records_of_a_state_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that crashed lost the end of the file; the next record was glued to the half of one."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    log = RunLog(path)
    with caplog.at_level(logging.WARNING):
        log.keep(4)
    log.append({"step": 5})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 5}\n'
    assert log.records == 3
    assert caplog.messages == [
        f"{path} has 2 of the 4 records up to the resumed state; the others were cut or lost, as by a crash, and are "
        "not written again: `graftvit evaluate` measures the student again"
    ]


@pytest.mark.parametrize(("end", "warned"), [('{"step": 3, "lo', True), ('{"step": 3}\n', False)])
def test_a_cut_line_after_the_state_is_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str, warned: bool
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{end}')
    with caplog.at_level(logging.WARNING):
        RunLog(path).keep(2)
    message = f"{path}: dropped a line after the resumed state, which is no whole record"
    assert caplog.messages == [message] * warned


def test_a_record_after_a_failed_write_is_whole(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.append({"step": 1})
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.append({"step": 3})
    assert read_records(log.path) == [{"step": 1}, {"step": 3}]


def test_an_unwritable_log_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="cannot be written: No such file or directory") as caught:
        RunLog(tmp_path / "absent" / "log.jsonl").append({"step": 1})
    assert caught.value.exit_code == 1


def test_a_full_disk_is_one_sentence() -> None:
    with pytest.raises(RunFailedError, match="No space left on device"):
        RunLog(Path("/dev/full")).append({"step": 1})
