"""Things that lie where a file should, and that nobody may wait for."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KINDS = {"pipe": "a pipe", "device": "a device", "folder": "a folder", "socket": "a socket"}
"""What each is called in an error."""


def irregular(kind: str, path: Path) -> Path:
    """Puts something of this kind at a path where nothing is."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{short}/s")  # the name of a socket has at most a hundred characters
            Path(short, "s").rename(path)
    return path


class WaitedError(BaseException):
    """Somebody waited for what never comes."""


@contextmanager
def never_waiting(minutes: int = 5) -> Iterator[None]:
    """Ends a test that waits for ever; a machine would have to be a thousand times slower to get here otherwise."""

    def end(*_: object) -> None:
        raise WaitedError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60 * minutes)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
