"""What is said where a process that loads data dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...models.errors import LostLoaderError

LOST_PROCESS = (ConnectionError, EOFError, FileNotFoundError)
"""What the exchange of tensors fails with when the process that holds them is gone."""


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Turn what torch raises for a dead loader process into LostLoaderError.

    The handler of a signal raises it, so that it comes out of whatever this process is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise lost(error) from error


def lost(error: Exception) -> LostLoaderError:
    """Return the error for a loader process that has died, of which `error` tells."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LostLoaderError(
        f"a loader process died ({reason}); it may have run out of memory: try a smaller data.workers"
    )
