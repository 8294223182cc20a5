"""The errors that GraftViT raises for a user's mistake: one sentence with the flag, the value and the valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2_000
"""Characters of a sentence."""
LONGEST_WORD = 300
"""Characters of a name or a path in it."""
ENDS = 120
"""Characters of a longer one that are shown at each end."""


def escaped(text: str) -> str:
    """`text` with an escape in place of each character that could steer a terminal; lines and tabs stay."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )


def one_sentence(text: str, longest: int = LONGEST) -> str:
    """`text` as it may be shown: one line, nothing that steers a terminal, what is too long without its middle.

    A sentence that is fit already stays as it is.
    """
    lines = (line.strip() for line in text.replace("\t", " ").splitlines())
    words = " ".join(_shortened(escaped(word)) for word in " ".join(filter(None, lines)).split(" "))
    if len(words) <= longest:
        return words
    left_out = f" ... ({len(words):,} characters) ... "
    half = (longest - len(left_out)) // 2
    return words[:half].rstrip() + left_out + words[-half:].lstrip()


def _shortened(word: str) -> str:
    if len(word) <= LONGEST_WORD:
        return word
    return f"{word[:ENDS]}...({len(word):,} characters)...{word[-ENDS:]}"


class GraftError(Exception):
    """A mistake that the user can correct. The command line prints it in one line and exits with `exit_code`."""

    exit_code = 2

    def __str__(self) -> str:
        return one_sentence(super().__str__())


class UnsupportedModelError(GraftError):
    """A model, block or attention layer that no adapter covers."""


class CheckpointError(GraftError):
    """A file that cannot be read, is damaged, is unsafe, or does not fit the model."""


class TransferError(GraftError):
    """A teacher, a student and a transfer method that do not go together."""


class ConfigError(GraftError):
    """A configuration key or value that is not valid."""


class DataError(GraftError):
    """A data set that cannot be found or read."""


class RunFailedError(GraftError):
    """A run that could not go on (non-finite loss, full disk); what was saved before is intact."""

    exit_code = 1


def counted(count: int, thing: str) -> str:
    """`1 batch`, `2 batches`."""
    return (
        f"{count} {thing}"
        if count == 1
        else f"{count} {thing}{'es' if thing.endswith(('s', 'tch')) else 's'}"
    )


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown `name`: the nearest valid one, then all the valid ones."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}valid: {', '.join(names)}"
