"""Questions about a path that anybody may have typed: a name that no file can have is not there, and no error.

`Path.exists` raises for a name with a NUL or one that is too long; the functions of `os.path` do not.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from ..models.errors import ConfigError, GraftError

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


def nearest_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def near_path(path: str | Path, *, folders: bool = False) -> str:
    """`did you mean 'runs/teacher'?` for `runs/techer`, which is not there; nothing where no name beside it is like it.

    Args:
        path: As somebody typed it; the first part of it that is not there is what was mistyped.
        folders: Leave out files.
    """
    missing = Path(path)
    if is_there(missing):
        return ""
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
