"""What a command says: text in which nothing steers a terminal, whatever the names of files and models in it are."""

from __future__ import annotations

import logging
import sys

from ..models.errors import escaped


def say(text: str) -> None:
    """To standard output."""
    sys.stdout.write(escaped(text))


def say_aside(text: str) -> None:
    """To standard error: what is no result."""
    sys.stderr.write(escaped(text))


class PlainFormatter(logging.Formatter):
    """The message alone."""

    def format(self, record: logging.LogRecord) -> str:
        """As logging does, and then as `say`."""
        return escaped(super().format(record))


def log_plainly(level: int) -> None:
    """All loggers write to standard error, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
