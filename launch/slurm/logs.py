"""Find the logs of a job, print their last lines, follow them, and merge the logs of all ranks by time.

Lines of submitit, torch, srun and Slurm carry a time. A line without a time stays behind the line before it in its
file. Where no time decides, lower ranks come first.
"""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ...checkpoints.files import UnreadableError, open_regular
from .job_folder import Submission

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
    """Return ranks that have a log."""
    names = Path(submission.logs).glob(f"{submission.job_id}_*_log.*")
    found = (re.fullmatch(r"(\d+)_log\.(out|err)", path.name[len(submission.job_id) + 1 :]) for path in names)
    return sorted({int(match[1]) for match in found if match is not None})


def rank_of(path: Path) -> int:
    """Return the rank that wrote a log."""
    return int(path.stem.removesuffix("_log").rpartition("_")[2])


def tail(path: Path, lines: int) -> str:
    """Return the last `lines` lines; empty if the file does not exist yet. Only the end of a long file is read."""
    try:
        with open_regular(path, refusal=UnreadableError) as file:
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
    """Follow what is added to a file; a truncated file is read from its beginning again."""

    path: Path
    place: int = 0
    _rest: bytes = field(default=b"", repr=False)

    @classmethod
    def at_end(cls, path: Path) -> Follower:
        """Return a follower that starts at the present end of the file."""
        return cls(path, path.stat().st_size if path.exists() else 0)

    def new(self) -> str:
        """Whole lines that have come since the last call."""
        try:
            with open_regular(self.path, refusal=UnreadableError) as file:
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
        """Return the last line, if it has no newline yet."""
        data, self._rest = self._rest, b""
        return data.decode("utf-8", "replace")


def follow(
    files: Callable[[], tuple[Path, ...]], ended: Callable[[], bool], followers: dict[Path, Follower]
) -> Iterator[tuple[Path, str]]:
    """Yield texts as they are written, until the run has ended.

    Args:
        files: Returns the files to follow; called repeatedly, because a run may be submitted again.
        ended: Returns whether the run has ended; called every `ASK` seconds.
        followers: How far each file has been read.
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


_STARTS = "submitit INFO ("
"""Lines that submitit logs for every rank alike, recognized by their timestamp."""
_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))?")
_TORCH = re.compile(r"\[[A-Z](\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6})\d* ")


def all_files(submission: Submission) -> tuple[Path, ...]:
    """Standard error and standard output of each rank that has a log, by rank."""
    return tuple(path for rank in ranks_with_logs(submission) for path in log_files(submission, rank))


def merged(paths: Iterable[Path], lines: int) -> list[str]:
    """Return the last `lines` lines of each file, each with its rank in front, merged by time."""
    texts = {path: tail(path, lines).splitlines() for path in paths}
    width = _width(texts)
    streams = [_timed(path, found) for path, found in texts.items()]
    ordered = heapq.merge(*streams, key=lambda entry: (entry[0], entry[1]))
    return [_with_rank(rank, line, width) for _, rank, line in ordered if _tells(line)]


def with_rank(path: Path, text: str, paths: Iterable[Path]) -> str:
    """New lines of a file, each with its rank in front."""
    width = _width(paths)
    lines = [_with_rank(rank_of(path), line, width) for line in text.splitlines() if _tells(line)]
    return "".join(f"{line}\n" for line in lines)


def time_of(line: str, year: int) -> float | None:
    """Return the time of a line, Unix time; torch leaves out the year."""
    match = _ISO.search(line[:200])
    if match is not None:
        numbers, fraction = [int(number) for number in match.groups()[:6]], match[7] or "0"
    else:
        match = _TORCH.search(line[:200])
        if match is None:
            return None
        numbers, fraction = [year, *(int(number) for number in match.groups()[:5])], match[6]
    try:
        return datetime(*numbers).timestamp() + float(f"0.{fraction}")  # type: ignore[arg-type]
    except ValueError:
        return None


def _timed(path: Path, lines: Iterable[str]) -> Iterator[tuple[float, int, str]]:
    moment, rank = 0.0, rank_of(path)
    year = datetime.fromtimestamp(path.stat().st_mtime).year if path.exists() else 1970
    for line in lines:
        moment = max(moment, time_of(line, year) or 0.0)
        yield moment, rank, line


def _tells(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(_STARTS)


def _width(paths: Iterable[Path]) -> int:
    return max((len(str(rank_of(path))) for path in paths), default=1)


def _with_rank(rank: int, line: str, width: int) -> str:
    return f"{rank:>{width}}: {line}"
