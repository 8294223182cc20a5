"""A command line as a user types it, in this process; `tests/conftest.py` makes it the fixture `typed`."""

from __future__ import annotations

import shlex
from typing import Protocol

import pytest
from graftvit.launch.cli import main


class Said(Protocol):
    """What a command wrote."""

    out: str
    err: str


class Typed(Protocol):
    """Run a command: return what it says; AssertionError if it ends with another code."""

    def __call__(self, *words: object, code: int = 0) -> Said: ...


def run_typed(capsys: pytest.CaptureFixture[str], line: object = "", *words: object, code: int = 0) -> Said:
    """Split `line` as a shell does; further words stay whole."""
    typed = [*shlex.split(str(line)), *map(str, words)]
    ended = main(typed)
    said = capsys.readouterr()
    assert ended == code, f"{shlex.join(typed)}: {ended}\n{said.err}"
    return said
