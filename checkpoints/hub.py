"""Download files from the Hugging Face hub, through its own client and cache."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..models.errors import CheckpointError
from .atomic import FULL

# One sentence for each failure of the hub; none of them shows a token.

ELSEWHERE = "download its files elsewhere and give the folder as local-dir:path"
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
SHOWN = 8
"""Names in a hint at most."""
HINT_TIMEOUT = 3.0
"""Seconds; the error that the hint is for must not wait."""
PASSING = (408, 429, 500, 502, 503, 504)
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Libraries that the client sends its requests with, in one version or another."""


class UnreachableError(CheckpointError):
    """A file is not in the cache, and the hub cannot be asked."""


@contextmanager
def explained(repository: str, revision: str | None = None, filename: str | None = None) -> Iterator[None]:
    """Turn the errors of a download from `repository` into sentences.

    Raises CheckpointError: no such repository, revision or file, a private or gated one, a refused token, a
    limit, a cache that cannot be written; says what to do. UnreachableError: no connection, or offline mode.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__
        offline = isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError))
        if offline or is_network(cause) or status_of(cause) in PASSING:
            what = f"{filename} of {repository}" if filename else repository
            raise UnreachableError(_unreachable(what, cause)) from error
        sentence = _sentence(cause, repository, revision)
        if sentence is None:
            raise
        raise CheckpointError(sentence) from error


def is_network(error: BaseException) -> bool:
    """Return whether no answer came, or not all of it."""
    if isinstance(error, OfflineModeIsEnabled) or status_of(error) is not None:
        return False
    known = isinstance(error, (ConnectionError, TimeoutError, URLError))
    return known or type(error).__module__.partition(".")[0] in TRANSPORTS


def status_of(error: BaseException) -> int | None:
    """Return the status of the response that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def absent(repository: str, filename: str, revision: str | None) -> str:
    """Return the sentence for a file that the repository lacks, with the files that it has."""
    names = _hint(lambda: _file_names(repository, revision))
    near = _nearest(filename, names)
    hint = f"did you mean {near!r}?" if near else _listed(names, f"{repository}/tree/main")
    return f"{repository} has no {filename!r}; {hint}"


def line(error: BaseException) -> str:
    """Return the first line of an error's text, without a token and without the signatures of addresses."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = text.replace(get_token() or "<token>", "<token>")
    return re.sub(r"\?\S*=[^\s)]+", "", re.sub(r"\bhf_\w{8,}", "<token>", text))


def _unreachable(what: str, cause: BaseException) -> str:
    hub, status = constants.ENDPOINT, status_of(cause)
    if constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled):
        return f"{what} is not in the cache and HF_HUB_OFFLINE is set: unset it, or {ELSEWHERE}"
    if status == 429:
        return f"{hub} limits the rate of requests (429): wait a while, or {LOGIN} for a higher limit"
    if status is not None:
        return f"{what} is not in the cache and {hub} fails with {status}: try again later"
    return f"{what} is not in the cache and {hub} cannot be reached: check the network, or {ELSEWHERE}"


def _sentence(error: BaseException, repository: str, revision: str | None) -> str | None:
    """Return None for an error that has nothing to do with the hub."""
    hub, token = constants.ENDPOINT, get_token()
    if isinstance(error, GatedRepoError):
        terms = f"accept its terms on {hub}/{repository}"
        if token is None:
            return f"{repository} is gated: {terms} and {LOGIN}"
        return (
            f"{repository} is gated and your account has no access: {terms}, or, if you did, wait until its owners "
            "have agreed or use a token that may read gated repositories"
        )
    if isinstance(error, RepositoryNotFoundError):
        near = _nearest_repository(repository)
        hint = f" (did you mean {near!r}?)" if near else ""
        login = "use a token that may read it" if token else LOGIN
        return f"{repository} is not on {hub}{hint}: check the name, or {login} if it is private"
    if isinstance(error, RevisionNotFoundError):
        names = _hint(lambda: _revisions(repository))
        near = _nearest(revision or "", names)
        hint = f"did you mean {near!r}? " if near else ""
        return f"{repository} has no revision {revision!r}: {hint}{_listed(names, f'{repository}/commits')}"
    if status_of(error) == 401:
        named = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
        where = "correct or unset HF_TOKEN" if named else "log in again with `hf auth login`"
        return f"{hub} refuses your token (401): {where}"
    if isinstance(error, OSError) and error.errno is not None:
        return _disk(error, repository)
    if isinstance(error, (HFValidationError, HfHubHTTPError, OSError)):
        return f"{repository} cannot be downloaded: {line(error)}"
    return None


def _disk(error: OSError, repository: str) -> str:
    cache = constants.HF_HUB_CACHE
    if error.errno in FULL:
        return f"{repository} cannot be downloaded: the disk of {cache} is full; make room or set HF_HOME elsewhere"
    if str(error.filename or "").startswith(str(cache)) or not error.filename:
        reason = error.strerror or type(error).__name__
        return f"the cache {cache} cannot be written: {reason}; set HF_HOME to a folder that can"
    return f"{repository} cannot be downloaded: {line(error)}"


def _listed(names: list[str], page: str) -> str:
    if not names:
        return f"{constants.ENDPOINT}/{page} lists what it has"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"it has {', '.join(names[:SHOWN])}{more}"


def _nearest_repository(repository: str) -> str | None:
    """Return the repository that `repository` may have meant: of the same owner, or else of another one."""
    owner, _, name = repository.rpartition("/")
    siblings = _hint(lambda: [model.id for model in HfApi().list_models(author=owner, limit=500)])
    near = _nearest(name, sorted({found.rpartition("/")[2] for found in siblings} - {name}))
    if near is not None:
        return f"{owner}/{near}"
    alike = _hint(lambda: [model.id for model in HfApi().list_models(search=name, limit=100)])
    return _nearest(repository, [found for found in alike if found != repository])


def _revisions(repository: str) -> list[str]:
    """Return the branches and tags of a repository."""
    refs = HfApi().list_repo_refs(repository)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _file_names(repository: str, revision: str | None) -> list[str]:
    """Return the files of a repository."""
    files = HfApi().model_info(repository, revision=revision, timeout=HINT_TIMEOUT).siblings
    return [file.rfilename for file in files or []]


def _hint(ask: Callable[[], list[str]]) -> list[str]:
    """Return the names that the hub gives; none if it fails, because a hint must not hide the error that it is for."""
    with suppress(Exception):
        return ask()
    return []


def _nearest(name: str, valid: Sequence[str]) -> str | None:
    """Return the one of `valid` that reads most like `name`, if any does."""
    by_lower = {one.lower(): one for one in valid}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


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
