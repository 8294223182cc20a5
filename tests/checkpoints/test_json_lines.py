"""JSON Lines: a cut line keeps to itself, is left out, and is spoken of."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest
from graftvit.checkpoints import json_lines
from graftvit.checkpoints.json_lines import append_line, open_lines, parse_record, read_records
from graftvit.models.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def added(path: Path, *lines: str) -> None:
    with open_lines(path) as file:
        for line in lines:
            append_line(file, line)


def test_a_line_after_a_cut_one_is_a_line_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    added(path, '{"a": 1}')
    with path.open("ab") as file:
        file.write(b'{"a": 2, "lo')
    added(path, '{"a": 3}', '{"a": 4}')
    assert path.read_text() == '{"a": 1}\n{"a": 2, "lo\n{"a": 3}\n{"a": 4}\n'
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": 1}, {"a": 3}, {"a": 4}]
        assert read_records(path) == [{"a": 1}, {"a": 3}, {"a": 4}]
    (message,) = caplog.messages  # once, for readers that look again and again
    assert message == f"{path}: left out line 2, which is no whole record"


def test_a_record_without_its_line_end_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": 1}, {"a": 2}]
    added(path, '{"a": 3}')
    assert read_records(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert not caplog.messages


def test_many_lines_that_are_none_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\x00" * 4096 + b"\nnull\n7\n[]\n" + b'{"a": 1}\n' + b"\xff\n" * 20)
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [{"a": 1}]
    (message,) = caplog.messages
    assert message == f"{path}: left out lines 1, 2, 3, 4 and 20 more, which are no whole records"


@pytest.mark.parametrize(
    "line",
    [
        '{"a": ' * 100_000,
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        '{"a": ' + "9" * 5_000 + "}",
        '{"a": "' + "b" * json_lines.LINE + '"}',
    ],
    ids=["no end", "deep", "long number", "long"],
)
def test_what_no_record_is_like_is_none(line: str, tmp_path: Path) -> None:
    assert parse_record(line.encode()) is None
    path = tmp_path / "a.jsonl"
    path.write_text(f'{line}\n{{"a": 1}}\n')
    assert read_records(path) == [{"a": 1}]


def test_what_is_no_regular_file_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(CheckpointError, match=f"{path} is {kind}"):
            read_records(path)
    monkeypatch.setattr(json_lines, "SIZE", 10)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1234}\n')
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        read_records(path)


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "a.jsonl") == []


def test_other_kinds_of_line_ends_are_part_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    added(path, json.dumps({"a": "one\u2028two\x85three"}, ensure_ascii=False))
    assert read_records(path) == [{"a": "one\u2028two\x85three"}]


OPENS = re.compile(r"""open\(\s*["']a|json\.loads\((?:line|row)\b""")
NO_RECORDS = {
    "launch/slurm/pitfalls.py": "what submitit's local controller says",
    "transfer/cache/target_shards.py": "a lock, which is empty",
    "transfer/cells/pool.py": "what a process of a cell says",
}


def test_nobody_else_adds_lines_or_reads_records_from_them() -> None:
    """One writer and one reader know a cut line; files in which nobody looks for records may be added to."""
    packages = ("models", "checkpoints", "transfer", "launch")
    found = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if OPENS.search(path.read_text())
    }
    assert found - set(NO_RECORDS) == {"checkpoints/json_lines.py"}
