"""The logs of a job: where they are, their last lines, and following them while they grow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .files import Submission

POLL = 0.5
ASK = 5.0
"""Seconds between two looks at the files, and between two questions whether the run has ended."""
_CHUNK = 1 << 16


def log_files(submission: Submission, rank: int) -> tuple[Path, Path]:
    """Standard error and standard output of a rank, as submitit names them."""
    folder = Path(submission.logs)
    stem = f"{submission.job_id}_{rank}_log"
    return folder / f"{stem}.err", folder / f"{stem}.out"


def ranks_with_logs(submission: Submission) -> list[int]:
    """Ranks that have a log."""
    names = Path(submission.logs).glob(f"{submission.job_id}_*_log.*")
    found = (re.fullmatch(r"(\d+)_log\.(out|err)", path.name[len(submission.job_id) + 1 :]) for path in names)
    return sorted({int(match[1]) for match in found if match is not None})


def rank_of(path: Path) -> int:
    """The rank that wrote a log."""
    return int(path.stem.removesuffix("_log").rpartition("_")[2])


def tail(path: Path, lines: int) -> str:
    """The last `lines` lines; nothing where there is no file yet. Only the end of a long file is read."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            data = b""
            while end > 0 and data.count(b"\n") <= lines:
                begin = max(0, end - _CHUNK)
                file.seek(begin)
                data, end = file.read(end - begin) + data, begin
    except OSError:
        return ""
    return "".join(data.decode("utf-8", "replace").splitlines(keepends=True)[-lines:]) if lines > 0 else ""


@dataclass
class Follower:
    """What is added to a file; a file that was cut short is read from its beginning again."""

    path: Path
    place: int = 0
    _rest: bytes = field(default=b"", repr=False)

    @classmethod
    def at_end(cls, path: Path) -> Follower:
        """Follows from what the file holds now."""
        return cls(path, path.stat().st_size if path.exists() else 0)

    def new(self) -> str:
        """Whole lines that have come since the last call."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self.place:
                    self.place, self._rest = 0, b""
                file.seek(self.place)
                data = file.read()
        except OSError:  # not there yet
            return ""
        self.place += len(data)
        whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
        return (whole + newline).decode("utf-8", "replace")

    def rest(self) -> str:
        """A last line without an end."""
        data, self._rest = self._rest, b""
        return data.decode("utf-8", "replace")


def follow(
    files: Callable[[], tuple[Path, ...]], ended: Callable[[], bool], followers: dict[Path, Follower]
) -> Iterator[tuple[Path, str]]:
    """Texts as they are written, until the run has ended.

    Args:
        files: The files to follow; asked again and again, as a run may be submitted anew.
        ended: Whether the run has ended; asked every `ASK` seconds.
        followers: Where each file has been read to.
    """
    asked = time.monotonic()
    while True:
        over = time.monotonic() - asked >= ASK
        if over:
            asked = time.monotonic()
            over = ended()
        for path in files():
            follower = followers.setdefault(path, Follower(path))
            text = follower.new() + (follower.rest() if over else "")
            if text:
                yield path, text
        if over:
            return
        time.sleep(POLL)
