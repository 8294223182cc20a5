"""One sentence for what goes wrong on the way to the hub; none of them shows a token."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...models.errors import CheckpointError
from ..atomic import FULL
from .hints import file_names, nearest, nearest_repository, revisions
from .retry import ExhaustedError, asked_wait, origin, passes, status_of

Result = TypeVar("Result")
ELSEWHERE = "download its files elsewhere and give the folder as local-dir:path"
SHOWN = 8
"""So many names at most in a hint."""


class UnreachableError(CheckpointError):
    """A file that is not in the cache while the hub cannot be asked."""


def explained(action: Callable[[], Result], repository: str, revision: str | None = None) -> Result:
    """Runs `action`, which downloads from `repository`.

    Raises CheckpointError: no such repository, revision or file, a private or gated one, a refused token, a
    limit, a cache that cannot be written; says what to do. UnreachableError: no connection, or offline mode.
    """
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:
        cause = origin(error)
        if passes(cause) or isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
            raise UnreachableError(unreachable(repository, error)) from error
        sentence = _sentence(cause, repository, revision)
        if sentence is None:
            raise
        raise CheckpointError(sentence) from error


def _sentence(error: BaseException, repository: str, revision: str | None) -> str | None:
    """None for an error that has nothing to do with the hub."""
    if isinstance(error, GatedRepoError):
        return _gated(repository)
    if isinstance(error, RepositoryNotFoundError):
        return _no_repository(repository)
    if isinstance(error, RevisionNotFoundError):
        return _no_revision(repository, revision)
    if status_of(error) == 401:
        return _bad_token()
    if isinstance(error, OSError) and error.errno is not None:
        return _disk(error, repository)
    if isinstance(error, (HFValidationError, HfHubHTTPError, OSError)):
        return f"{repository} cannot be downloaded: {line(error)}"
    return None


def absent(repository: str, filename: str, revision: str | None) -> str:
    """The sentence for a file that the repository does not have, with the ones that it has."""
    names = file_names(repository, revision)
    near = nearest(filename, names)
    hint = f"; did you mean {near!r}?" if near else ""
    return (
        f"{repository} has no {filename!r}{hint or '; ' + _listed(names, _page(repository) + '/tree/main')}"
    )


def unreachable(repository: str, error: BaseException | None = None, lacking: str | None = None) -> str:
    """The sentence for what is neither in the cache nor to be had; `lacking` names the file."""
    what = f"{lacking} of {repository}" if lacking else repository
    cause = None if error is None else origin(error)
    if constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled):
        return f"{what} is not in the cache and HF_HUB_OFFLINE is set: unset it, or {ELSEWHERE}"
    status = None if cause is None else status_of(cause)
    often = f" in {error.attempts} attempts" if isinstance(error, ExhaustedError) else ""
    if cause is not None and status == 429:
        wait = asked_wait(cause)
        pause = "a while" if wait is None else f"{wait:.0f} s"
        return (
            f"{constants.ENDPOINT} limits the rate of requests (429{often}): "
            f"wait {pause}, or log in with `hf auth login` for a higher limit"
        )
    if status is not None:
        return (
            f"{what} is not in the cache and {constants.ENDPOINT} fails with {status}{often}: try again later"
        )
    return (
        f"{what} is not in the cache and {constants.ENDPOINT} cannot be reached{often}: "
        f"check the network, or {ELSEWHERE}"
    )


def line(error: BaseException) -> str:
    """The first line of an error's text, without a token and without the signatures of addresses."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    token = get_token()
    if token:
        text = text.replace(token, "<token>")
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", re.sub(r"\bhf_\w{8,}", "<token>", text))


def _gated(repository: str) -> str:
    if get_token() is None:
        return (
            f"{repository} is gated: accept its terms on {_page(repository)} and log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    return (
        f"{repository} is gated and your account has no access: accept its terms on {_page(repository)}, "
        "or, if you did, wait until its owners have agreed or use a token that may read gated repositories"
    )


def _no_repository(repository: str) -> str:
    near = nearest_repository(repository)
    hint = f" (did you mean {near!r}?)" if near else ""
    login = "use a token that may read it" if get_token() else "log in with `hf auth login` or set HF_TOKEN"
    return f"{repository} is not on {constants.ENDPOINT}{hint}: check the name, or {login} if it is private"


def _no_revision(repository: str, revision: str | None) -> str:
    names = revisions(repository)
    near = nearest(revision or "", names)
    hint = f"did you mean {near!r}? " if near else ""
    return (
        f"{repository} has no revision {revision!r}: {hint}{_listed(names, _page(repository) + '/commits')}"
    )


def _bad_token() -> str:
    named = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    where = "correct or unset HF_TOKEN" if named else "log in again with `hf auth login`"
    return f"{constants.ENDPOINT} refuses your token (401): {where}"


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
        return f"{page} lists what it has"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"it has {', '.join(names[:SHOWN])}{more}"


def _page(repository: str) -> str:
    return f"{constants.ENDPOINT}/{repository}"
