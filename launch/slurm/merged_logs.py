"""The logs of all ranks in one, by time where their lines tell it.

Lines that carry a time are those of submitit, torch, srun and Slurm. A line without one stays behind the line before it
in its file. Where nothing tells, lower ranks come first.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from .files import Submission
from .logs import log_files, rank_of, ranks_with_logs, tail

_STARTS = "submitit INFO ("
"""What submitit says of each rank alike: told by its time alone."""
_ISO = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))?")
_TORCH = re.compile(r"\[[A-Z](\d\d)(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6})\d* ")


def all_files(submission: Submission) -> tuple[Path, ...]:
    """Standard error and standard output of each rank that has a log, by rank."""
    return tuple(path for rank in ranks_with_logs(submission) for path in log_files(submission, rank))


def merged(paths: Iterable[Path], lines: int) -> list[str]:
    """Returns the last `lines` lines of each file, each with its rank in front, merged by time."""
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
    """The time that a line carries, Unix time; torch leaves out the year."""
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
