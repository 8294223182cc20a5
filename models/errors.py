"""The errors that GraftViT raises for a user's mistake: one sentence with the flag, the value and the valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftError(Exception):
    """A mistake that the user can mend. The command line prints it in one line and exits with `exit_code`."""

    exit_code = 2


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


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown `name`: the nearest valid one, then all the valid ones."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}valid: {', '.join(names)}"
