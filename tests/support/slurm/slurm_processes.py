"""Finds and ends the processes of a test's Slurm cluster: known by their environment, held by pid and start time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


class ClusterError(Exception):
    """The cluster, or a command given to it, did not do what it was asked to."""


@dataclass(frozen=True)
class Process:
    """One process; a later one that got the same pid has another start time and is another process."""

    pid: int
    start: int

    def send(self, signum: signal.Signals) -> None:
        found = _read(self.pid)
        if found is not None and found.process == self:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def __str__(self) -> str:
        with contextlib.suppress(OSError):
            words = (PROC / str(self.pid) / "cmdline").read_bytes().replace(b"\0", b" ")
            return f"{self.pid} ({words.decode(errors='replace').strip()[:200]})"
        return str(self.pid)


@dataclass(frozen=True)
class _Row:
    process: Process
    parent: int
    state: str


def _read(pid: int) -> _Row | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # the name in parentheses may hold blanks and parentheses of its own
    fields = text[text.rindex(")") + 2 :].split()
    return _Row(Process(pid, int(fields[19])), parent=int(fields[1]), state=fields[0])


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if b"=" in entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _table() -> list[_Row]:
    """Every process that runs, without zombies and without this one."""
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    rows = [row for pid in pids if pid != os.getpid() and (row := _read(pid)) is not None]
    return [row for row in rows if row.state not in "ZX"]


def children(pid: int) -> list[int]:
    return [row.process.pid for row in _table() if row.parent == pid]


def marked(mark: Mapping[str, str]) -> set[Process]:
    """Processes that have all of `mark` in their environment, and the descendants of these, whatever theirs says."""
    table = _table()
    found = {row.process for row in table if mark.items() <= _environment(row.process.pid).items()}
    while more := {row.process for row in table if row.parent in {one.pid for one in found}} - found:
        found |= more
    return found


def marked_under(folder: Path) -> set[Process]:
    """Processes of any cluster in `folder`."""
    return marked({"SLURM_CONF": str(folder / "slurm.conf")})


def end(mark: Mapping[str, str], seconds: float = 30.0) -> None:
    """Kills all that `marked` finds, until it finds nothing.

    All are stopped first: a slurmstepd that outlives its task by a millisecond reports that the task was killed,
    and a daemon that outlives another one starts new processes.

    Raises:
        ClusterError: Some are still there after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while found := marked(mark):
        if time.monotonic() > deadline:
            raise ClusterError(f"cannot end {', '.join(map(str, found))}")
        stopped: set[Process] = set()
        while new := marked(mark) - stopped:
            for process in new:
                process.send(signal.SIGSTOP)
            stopped |= new
        for process in stopped:
            process.send(signal.SIGKILL)
        time.sleep(0.02)
