"""Progress on standard error: a line a minute in a log, one line that goes away on a terminal."""

from __future__ import annotations

import io
import logging

import pytest
from graftvit.transfer.data import loading
from graftvit.transfer.data.loading import followed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter(range(0, 500, 25))
    monkeypatch.setattr(loading.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.WARNING):
        assert list(followed("abcdefgh", 8, "evaluation")) == list("abcdefgh")
    assert [record.getMessage() for record in caplog.records] == [
        "evaluation: 38 %, about 125 s left",
        "evaluation: 75 %, about 50 s left",
    ]


def test_a_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    assert list(followed("abc", 3, "evaluation")) == list("abc")
    assert "evaluation" in shown.getvalue()
    assert not caplog.records
