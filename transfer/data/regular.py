"""Regular files alone: a pipe or a device among the images must not be waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_TEXT = 64 << 20
"""Bytes of a list of names; far more than any has."""


def open_regular(path: str | Path) -> BinaryIO:
    """`path` open for reading. Raises OSError: it cannot be opened, or is a folder, a pipe, a socket or a device."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """The text of a small file. Raises OSError as `open_regular`, or where it is large; UnicodeDecodeError."""
    with open_regular(path) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise OSError(errno.EFBIG, f"it has more than {MAX_TEXT >> 20} MiB", str(path))
    return content.decode("utf-8")
