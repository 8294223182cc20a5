"""JSON Lines: one JSON object a line. A crash or a full disk can cut a line, which must spoil no other one."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import BinaryIO

from ..models.errors import CheckpointError, GraftError, JsonDict
from .files import open_regular
from .report import some

logger = logging.getLogger(__name__)

SIZE = 1 << 30
"""Bytes of a file that is read: the log of a million steps has a fifth."""
LINE = 1 << 20
"""Bytes of a record; the largest have some thousands."""
DEPTH = 16
"""Objects and lists in one another in a record; ours have three."""


def open_lines(path: Path) -> BinaryIO:
    """Open a file for `append_line`; it may be new. Raises OSError."""
    return path.open("a+b")


def append_line(file: BinaryIO, line: str) -> None:
    """Add a line to a file of `open_lines`. A line that was cut before is ended first. Raises OSError."""
    cut = file.seek(0, os.SEEK_END) > 0 and _last_byte(file) != b"\n"
    file.write(("\n" * cut + f"{line}\n").encode())
    file.flush()


def read_lines(path: Path, *, refusal: type[GraftError] = CheckpointError) -> list[bytes]:
    """Return the lines of a file. Raises `refusal` as `open_regular`, or: the file has more than `SIZE` bytes."""
    with open_regular(path, refusal=refusal) as file:
        try:
            content = file.read(SIZE + 1)
        except OSError as error:
            raise refusal(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > SIZE:
        raise refusal(f"{path} is refused: it has more than {SIZE:,} bytes, which no file of records needs")
    return content.removesuffix(b"\n").split(b"\n") if content else []


def parse_record(line: bytes) -> JsonDict | None:
    """Return the object of a line; None if it was cut, is no object, is longer than `LINE` or deeper than `DEPTH`."""
    try:
        record = json.loads(line.decode("utf-8")) if len(line) <= LINE else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _within(record, DEPTH) else None


def read_records(path: Path, *, refusal: type[GraftError] = CheckpointError) -> list[JsonDict]:
    """Return the records of a file; none where there is no file. Warn of the lines that are left out.

    Raises `refusal` as `read_lines`.
    """
    lines = read_lines(path, refusal=refusal) if path.exists() else []
    records = [parse_record(line) for line in lines]
    damaged = tuple(str(number) for number, record in enumerate(records, 1) if record is None)
    if damaged:
        _warn(path, damaged)
    return [record for record in records if record is not None]


@functools.lru_cache
def _warn(path: Path, numbers: tuple[str, ...]) -> None:
    """Warn once, because `graftvit jobs` and others read the same files again and again."""
    what = (
        "line {}, which is no whole record" if len(numbers) == 1 else "lines {}, which are no whole records"
    )
    logger.warning("%s: left out %s", path, what.format(some(numbers)))


def _within(value: object, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_within(each, depth - 1) for each in inner)


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
