"""Read files, in the one place that opens them: regular ones, of bounded size, each failure one sentence."""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import stat
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from ..models.errors import CheckpointError, ConfigError, GraftError, JsonDict
from .report import some

# Questions about a path that anybody may have typed: a name that no file can have is not there, and no error.
#
# `Path.exists` raises for a name with a NUL or one that is too long; the functions of `os.path` do not.

LONGEST_NAME = 180
"""Bytes of a name: file systems allow 255, and temporary names beside a file are longer than its own."""
NOT_A_URL = "give a path on this machine, such as a mounted folder, not a URL"


def is_there(path: str | Path) -> bool:
    """Return whether a file or folder of that name exists."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | Path) -> bool:
    """Return whether it is a file."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Return whether it is a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def is_url(path: str | Path) -> bool:
    """Return whether it is a URL, such as `s3://bucket/run`, of which `Path` makes the folder `s3:`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def at_home(path: str | PathLike[str]) -> Path:
    """Return a path with its leading `~` replaced; that of a user who is not there stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def place(path: str | PathLike[str]) -> Path:
    """Return where a user asked to write. Raises CheckpointError: no file can have such a name."""
    found = at_home(path)
    if "\0" in str(found) or any(len(os.fsencode(part)) > LONGEST_NAME for part in found.parts):
        raise CheckpointError(
            f"{str(path)!r} is no name of a file: give at most {LONGEST_NAME} bytes, none of them 0"
        )
    return found


def set_aside(path: Path) -> Path:
    """Return where a folder lies for the moment in which a new one takes its place (`atomic.write_folder`)."""
    return path.with_name(f".{path.name}.graftvit-old")


def safe_name(name: str, what: str, *, refusal: type[GraftError] = ConfigError) -> str:
    """Return a name that becomes one part of a path, and so leads to no other folder.

    Raises `refusal`, which begins with `what`: it is no such name.
    """
    if re.fullmatch(r"[\w+-][\w+.,=~-]*", name) and len(name.encode()) <= LONGEST_NAME:
        return name
    raise refusal(
        f"{what}: {name!r} is no name of a file: give at most {LONGEST_NAME} letters, digits and _+-.,=~, no dot "
        "first"
    )


def digest(described: Any) -> str:
    """Return the name of plain data: the same data have the same name."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def nearest_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def near_path(path: str | Path, *, folders: bool = False) -> str:
    """`did you mean 'runs/teacher'?` for `runs/techer`, which is not there; nothing where no name beside it is like it.

    Of a link that leads nowhere, say so.

    Args:
        path: As somebody typed it; the first part of it that is not there is what was mistyped.
        folders: Leave out files.
    """
    missing = Path(path)
    if is_there(missing):
        return ""
    if os.path.islink(missing):  # noqa: PTH114
        return "it is a link that leads nowhere."
    if missing.name and is_there(set_aside(missing)):
        return f"what it held lies in {str(set_aside(missing))!r}, for its replacement was killed: rename that back."
    while missing.name and not is_folder(missing.parent):
        missing = missing.parent
    try:
        names = [path.name for path in missing.parent.iterdir() if _may_be(path, missing.name, folders)]
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.6)
    if not found:
        return ""
    near = missing.parent / found[0]
    inside = near / Path(path).relative_to(missing)
    return f"did you mean {str(inside if is_there(inside) else near)!r}?"


def _may_be(path: Path, typed: str, folders: bool) -> bool:
    hidden = path.name.startswith(".") and not typed.startswith(".")
    return not hidden and (not folders or is_folder(path))


MAX_TEXT = 16 << 20
"""Bytes of a text file (settings, an index, a card) that is read whole; the largest of these has a few."""


class UnreadableError(GraftError, OSError):
    """The refusal for callers that go on, or try again, after any OSError."""

    exit_code = 1


KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(path: Path) -> str | None:
    """Return `a pipe`, `a socket` or `a device` for a path that is one; None for anything else."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        return None
    return next((words for test, words in KINDS[1:] if test(mode)), None)


def check_regular(
    path: Path, inside: Path | None = None, *, refusal: type[GraftError] = CheckpointError
) -> Path:
    """Return the file that `path` leads to, every link resolved, without opening it.

    Args:
        refusal: the error to raise.
        inside: the folder that `path` belongs to. A link out of it is refused, except where the folder is a
            snapshot of the hub's cache, whose files are links to the `blobs` of the same repository.

    Raises `refusal`: it is not there, a link leads nowhere, in a circle or out of the folder, or it is a folder, a
    device, a pipe or a socket.
    """
    try:
        resolved = _resolve(path, refusal)
        mode = resolved.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = next((words for test, words in KINDS if test(mode)), "something else")
            raise refusal(f"{path} is {kind}, not a regular file")
        if inside is not None and not _belongs(resolved, _resolve(inside, refusal)):
            raise refusal(
                f"{path} is refused: it leads to {resolved}, outside of {inside}; copy the file there"
            )
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror or error}") from error
    return resolved


def open_regular(path: Path, *, refusal: type[GraftError] = CheckpointError) -> BinaryIO:
    """`path` open for reading, if it is a regular file; never waits for a pipe or a device.

    Raises `refusal` as `check_regular`, or where it cannot be read.
    """
    resolved = check_regular(path, refusal=refusal)
    try:
        # what lies there may have changed since: do not wait for a writer, and look again
        descriptor = os.open(
            resolved, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise refusal(f"{path} is no regular file")
        return file
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror or error}") from error


def read_regular(
    path: Path,
    *,
    limit: int = MAX_TEXT,
    errors: str = "strict",
    refusal: type[GraftError] = CheckpointError,
) -> str:
    """Return the text of a regular file of at most `limit` bytes of UTF-8.

    Args:
        errors: what to do with bytes that are no UTF-8, as in `bytes.decode`.

    Raises `refusal` as `open_regular`, or: it is larger, or no such text.
    """
    try:
        with open_regular(path, refusal=refusal) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise refusal(f"{path} is refused: it has more than {limit:,} bytes, which no such file needs")
        return content.decode("utf-8", errors)
    except GraftError:  # UnreadableError is an OSError, too
        raise
    except UnicodeDecodeError as error:
        raise refusal(f"{path} is damaged: it is no UTF-8 text") from error
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror or error}") from error


def read_if_there(path: Path, *, refusal: type[GraftError] = CheckpointError) -> str | None:
    """Return the text of a file as `read_regular`; None if it does not exist."""
    try:
        return read_regular(path, refusal=refusal)
    except refusal as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise


def read_json(path: Path, *, limit: int = MAX_TEXT, refusal: type[GraftError] = CheckpointError) -> Any:
    """Return the content of a file of JSON. Raises `refusal` as `read_regular`, or: it is no JSON, or too deep."""
    try:
        return json.loads(read_regular(path, limit=limit, refusal=refusal))
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path} is damaged: it is not JSON") from error


def _resolve(path: Path, refusal: type[GraftError]) -> Path:
    try:
        return path.resolve(strict=True)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise refusal(f"{path} is a link that leads nowhere: {path.readlink()}") from error
        raise refusal(f"{path} cannot be read: {error.strerror}") from error
    except RuntimeError as error:  # Python before 3.13
        raise refusal(f"{path} is a link that leads in a circle") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise refusal(f"{path} is a link that leads in a circle") from error
        raise refusal(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise refusal(f"{str(path)!r} is no path of a file: {error}") from error


def _belongs(file: Path, folder: Path) -> bool:
    if file.is_relative_to(folder):
        return True
    parts = folder.parts
    if "snapshots" not in parts:
        return False
    repository = Path(*parts[: len(parts) - 1 - parts[::-1].index("snapshots")])
    return folder != repository / "snapshots" and file.is_relative_to(repository / "blobs")


# JSON Lines: one JSON object a line. A crash or a full disk can cut a line, which must spoil no other one.

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
