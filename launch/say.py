"""The output of commands. Control characters in names of files and models are escaped before they reach a terminal."""

from __future__ import annotations

import logging
import shlex
import sys

from ..models.errors import escaped

# Commands in messages, quoted so that they can be pasted into a shell.


def hint(*words: object) -> str:
    """Return `graftvit WORDS` with each word quoted for a shell."""
    return shlex.join(["graftvit", *map(str, words)])


def say(text: str) -> None:
    """Write a result to standard output."""
    sys.stdout.write(escaped(text))


def say_aside(text: str) -> None:
    """Write to standard error what is not a result."""
    sys.stderr.write(escaped(text))


def tell(line: str) -> None:
    """Write a line about the progress of a command to standard error, at once."""
    say_aside(f"{line}\n")
    sys.stderr.flush()


class PlainFormatter(logging.Formatter):
    """Format a record as its message alone."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record and escape control characters."""
        return escaped(super().format(record))


def log_plainly(level: int) -> None:
    """Write the messages of all loggers from `level` up to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
