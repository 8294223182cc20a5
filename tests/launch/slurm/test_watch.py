"""`graftvit jobs --watch`, in a pipe and in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from graftvit.launch.slurm import jobs_text as module
from graftvit.launch.slurm.jobs import RunStatus
from graftvit.launch.slurm.jobs_text import Seen, watch

PENDING = RunStatus(Path("/r"), "12", "slurm", 0.0, "pending", "waits for nodes: Resources", starts=1.8e9)
RUNNING = RunStatus(Path("/r"), "12", "slurm", 0.0, "running")
SILENT = RunStatus(Path("/r"), "12", "slurm", 0.0, "unknown", problem="Slurm does not answer: no")
FINISHED = RunStatus(Path("/r"), "12", "slurm", 0.0, "finished")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, *states: RunStatus | None) -> str:
    """What is written of one run; None where it is not among those to show."""
    left = list(states)
    monkeypatch.setattr(module, "EVERY", 0.0)

    def look() -> Seen:
        run = left.pop(0)
        return ([], []) if run is None else ([run], ["/r"])

    watch(look, file, "nothing waits\n")
    assert not left
    return file.getvalue()


def test_a_pipe_gets_a_table_for_each_change_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), PENDING, PENDING, RUNNING, RUNNING, SILENT, FINISHED)
    assert text.count("restarts\n") == 4
    words = [word for word in ("pending", "running", "Slurm does not answer", "finished") if word in text]
    assert words == sorted(words, key=text.index)
    assert len(words) == 4
    assert "waits for nodes: Resources; expected at" in text


def test_a_terminal_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, Terminal(), PENDING, RUNNING, FINISHED)
    assert "finished" in text
    assert "\x1b[" in text


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_nothing_to_watch_is_said_once(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for states in ([None], [RUNNING, None]):  # one ends, with --active
        text = shown(monkeypatch, kind(), *states)
        assert text.split("\r")[-1].count("nothing waits") == 1
        assert text.rstrip().removesuffix("\x1b[?25h").rstrip().endswith("nothing waits")
