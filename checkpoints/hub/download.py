"""Files from the Hugging Face hub: from its cache, else downloaded, resumed and verified."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NoReturn

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata

from ...models.errors import CheckpointError
from .errors import UnreachableError, absent, explained, line, unreachable
from .fetch import RemoteFile, fetch, folder_of
from .retry import is_network, origin, retried, status_of

__all__ = ["UnreachableError", "cached", "commit_of", "download", "explained", "try_download"]

logger = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")


def download(repository: str, filename: str, revision: str | None) -> Path:
    """The local copy of a file of a hub repository, downloaded where the cache lacks it.

    What the cache has of a pinned commit is taken without a request. A branch that cannot be looked up is
    taken as the cache knows it, with a warning that names the commit. A download goes on where an earlier
    one stopped, and its hash is checked before it enters the cache.

    Raises CheckpointError as `explained`, or: no such file, or it came damaged twice.
    """
    path = try_download(repository, filename, revision)
    if path is None:
        raise CheckpointError(absent(repository, filename, revision))
    return path


def try_download(repository: str, filename: str, revision: str | None) -> Path | None:
    """As `download`, but None where the repository has no such file."""
    return explained(lambda: _obtain(repository, filename, revision), repository, revision)


def cached(repository: str, filename: str, revision: str | None) -> Path | None:
    """The copy of a file that is in the cache, without a request."""
    found = try_to_load_from_cache(repository, filename, revision=revision)
    return Path(found) if isinstance(found, str) else None


def commit_of(path: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to: …/snapshots/<commit>/file."""
    found = re.search(r"/snapshots/([0-9a-f]{7,64})/", path.as_posix())
    return found[1] if found else None


def _obtain(repository: str, filename: str, revision: str | None) -> Path | None:
    path = cached(repository, filename, revision)
    pinned = revision is not None and COMMIT.fullmatch(revision) is not None
    if path is not None and (pinned or constants.HF_HUB_OFFLINE):
        return path
    if (pinned or constants.HF_HUB_OFFLINE) and _known_absent(repository, filename, revision):
        return None
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(unreachable(repository, lacking=_lacking(repository, filename)))
    try:
        metadata = _metadata(repository, filename, revision, patient=path is None)
        if path is not None and commit_of(path) == metadata.commit_hash:
            return path
        return _downloaded(repository, filename, revision, metadata)
    except (RevisionNotFoundError, HFValidationError, CheckpointError):
        raise
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        _give_up(error, repository, filename)
    except Exception as error:
        if path is None:
            _give_up(error, repository, filename)
        cause = origin(error)
        if not is_network(cause) and status_of(cause) is None:
            raise
        logger.warning(
            "%s cannot be asked for %s (%s): going on with commit %s of the cache",
            constants.ENDPOINT, repository, line(cause), commit_of(path),
        )  # fmt: skip
        return path


def _metadata(repository: str, filename: str, revision: str | None, *, patient: bool) -> HfFileMetadata:
    """What the hub says of a file; tried once only where the cache has one to fall back on."""
    url = hf_hub_url(repository, filename, revision=revision)

    def ask() -> HfFileMetadata:
        return get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)

    try:
        return retried(ask) if patient else ask()
    except EntryNotFoundError:
        hf_hub_download(repository, filename, revision=revision)  # writes down that there is none
        raise


def _downloaded(repository: str, filename: str, revision: str | None, metadata: HfFileMetadata) -> Path:
    commit, etag = metadata.commit_hash, metadata.etag
    for name in (commit, etag):  # both become names of files
        if not name or re.fullmatch(r"\w[\w.+=-]*", name) is None:
            raise CheckpointError(
                f"{constants.ENDPOINT} does not answer as a hub: {filename} has no valid {name!r}"
            )
    file = RemoteFile(repository, filename, str(commit), str(etag), metadata.size)
    fetch(file)
    # The client finds the content in place, and makes the entry of this commit.
    path = retried(lambda: hf_hub_download(repository, filename, revision=commit))
    if revision != commit:
        _remember(file, revision or constants.DEFAULT_REVISION)
    return Path(path)


def _remember(file: RemoteFile, revision: str) -> None:
    """Writes down in the cache, in one step, which commit a branch or tag is at."""
    known = file.folder / "refs" / revision
    known.parent.mkdir(parents=True, exist_ok=True)
    written = file.blob.with_name(f"{os.getpid()}.ref.incomplete")
    written.write_text(file.commit)
    written.replace(known)


def _known_absent(repository: str, filename: str, revision: str | None) -> bool:
    """Whether the cache has it in writing that this commit has no such file."""
    found = try_to_load_from_cache(repository, filename, revision=revision)
    return found is not None and not isinstance(found, str)


def _give_up(error: Exception, repository: str, filename: str) -> NoReturn:
    """Raises `error`; one of the connection names the file where the cache has others of the repository."""
    lacking = _lacking(repository, filename)
    if lacking is None or not is_network(origin(error)):
        raise error
    raise UnreachableError(unreachable(repository, error, lacking)) from error


def _lacking(repository: str, filename: str) -> str | None:
    """`filename` where the cache has something of the repository."""
    folder = folder_of(repository) / "snapshots"
    return filename if folder.is_dir() and any(folder.iterdir()) else None
