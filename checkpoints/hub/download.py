"""Download files from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

from ...models.errors import CheckpointError
from .hub_errors import absent, explained, is_network, line, status_of

logger = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")


def download(repository: str, filename: str, revision: str | None) -> Path:
    """Return the local copy of a file of a hub repository, downloaded if the cache lacks it.

    A file of a pinned commit that is in the cache needs no request. If a branch cannot be looked up, use the commit
    that the cache knows and log a warning that names it.

    Raises CheckpointError as `explained`, or: there is no such file.
    """
    path = try_download(repository, filename, revision)
    if path is None:
        raise CheckpointError(absent(repository, filename, revision))
    return path


def try_download(repository: str, filename: str, revision: str | None) -> Path | None:
    """Like `download`, but return None if the repository has no such file."""
    with explained(repository, revision, filename):
        return _obtain(repository, filename, revision)


def commit_of(path: Path) -> str | None:
    """Return the commit that a file of the hub's cache belongs to: …/snapshots/<commit>/file."""
    found = re.search(r"/snapshots/([0-9a-f]{7,64})/", path.as_posix())
    return found[1] if found else None


def _obtain(repository: str, filename: str, revision: str | None) -> Path | None:
    known = try_to_load_from_cache(repository, filename, revision=revision)
    path = Path(known) if isinstance(known, str) else None
    is_final = constants.HF_HUB_OFFLINE or (revision is not None and COMMIT.fullmatch(revision) is not None)
    if known is not None and is_final:
        return path  # None if the cache records that this commit has no such file
    if path is not None and _is_current(path, repository, filename, revision):
        return path
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _is_current(path: Path, repository: str, filename: str, revision: str | None) -> bool:
    """Return whether the hub still has a cached file at its branch; true, with a warning, if it does not answer."""
    url = hf_hub_url(repository, filename, revision=revision)
    try:
        return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).commit_hash == commit_of(path)
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    except Exception as error:
        if not is_network(error) and status_of(error) is None:
            raise
        logger.warning(
            "%s cannot be asked for %s (%s): using commit %s of the cache",
            constants.ENDPOINT, repository, line(error), commit_of(path),
        )  # fmt: skip
        return True
