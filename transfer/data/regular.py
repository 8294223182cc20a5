"""Regular files alone: a pipe or a device among the images must not be waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ...models.errors import DataError

MAX_TEXT = 64 << 20
"""Bytes of a list of names; far more than any has."""


def open_regular(path: str | Path) -> BinaryIO:
    """`path` open for reading.

    Raises DataError where it is a folder, a pipe, a socket or a device; OSError where it cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """The text of a small file. Raises as `open_regular`, and UnicodeDecodeError."""
    with open_regular(path) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise DataError(f"{path} is larger than the {MAX_TEXT >> 20} MiB that a list of names may have")
    return content.decode("utf-8")
