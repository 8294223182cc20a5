"""Send a student to the hub in one commit, with one sentence for each failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from json import JSONDecodeError
from traceback import walk_tb
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...models.errors import CheckpointError, RunFailedError
from ..hub.download import download
from ..hub.hub_errors import is_network, line, status_of
from ..regular_files import read_regular
from .card import is_generated
from .claim import license_of_card
from .student_files import CARD, WEIGHTS_PATTERN, Upload

Result = TypeVar("Result")


class UploadFailedError(CheckpointError, RunFailedError):
    """The hub failed or could not be reached, for a `reason` that is no advice; exit code 1."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


@dataclass(frozen=True)
class Remote:
    """What the hub has under the name."""

    exists: bool
    private: bool = False
    commit: str | None = None
    """Of the branch, None where there is no such branch yet."""
    files: Mapping[str, int | None] = field(default_factory=dict)
    """Sizes in bytes, None where the hub does not say."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    url: str
    """Of the commit."""
    commit: str
    changed: bool
    """False where the hub had all of it already."""
    kept_card: bool
    """Whether the hub's card stayed, because a person edited it."""
    private: bool
    """Whether it is for its owner alone."""


def ask_remote(upload: Upload) -> Remote:
    """Return what the repository holds now. Raises CheckpointError in one sentence."""
    name, revision = upload.facts.repository, upload.facts.revision

    def ask() -> Remote:
        try:
            info = _api().model_info(name, revision=revision, files_metadata=True)
        except RevisionNotFoundError:
            info = _api().model_info(name)
            return Remote(True, bool(info.private))
        except RepositoryNotFoundError as error:
            if status_of(error) == 401 and get_token() is None:
                return Remote(False)
            if status_of(error) == 401:
                raise
            return Remote(False)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        return Remote(True, bool(info.private), info.sha, sizes)

    return _explained(ask, upload)


def replaced_and_removed(upload: Upload, remote: Remote) -> tuple[list[str], list[str]]:
    """Return files of the hub that the commit overwrites, and weights that it removes because they are not the
    student's."""
    names = {file.name for file in upload.files}
    stale = [name for name in remote.files if name not in names and WEIGHTS_PATTERN.fullmatch(name)]
    return sorted(names & remote.files.keys()), sorted(stale)


def keeps_remote_card(upload: Upload, remote: Remote) -> bool:
    """Return whether the hub has a card that a person edited, while this push brings a generated one.

    Raises CheckpointError: that card names a license that this student may not be under.
    """
    if upload.own_card or CARD not in remote.files:
        return False
    path = download(upload.facts.repository, CARD, remote.commit)
    card = read_regular(path, errors="replace")
    if is_generated(card) or not card.strip():
        return False
    claim = replace(upload.claim, named=upload.claim.license is not None)
    license_of_card(card, claim, f"{CARD} on the hub")
    return True


def check_visibility(upload: Upload, remote: Remote, *, private: bool) -> None:
    """Raise CheckpointError for a repository that is public already although `private` is asked for."""
    name = upload.facts.repository
    if private and remote.exists and not remote.private:
        raise CheckpointError(
            f"--private, but {name} is there and public: make it private on {constants.ENDPOINT}/{name}/settings, "
            "or leave --private out"
        )


def push_student(
    upload: Upload, *, private: bool = False, public: bool = False, message: str | None = None
) -> Pushed:
    """Create the repository and the branch if needed, and commit all files at once.

    A new repository is as visible as its owner has them by default, but private until all is there, so that a push
    which fails has published nothing. Files of a stopped push stay on the hub; the next push continues from
    there.

    Args:
        private: keep a new repository private, and refuse one that is public.
        public: make a repository public once all is there, whatever it is or would be by default.
        message: of the commit.

    Raises CheckpointError in one sentence: no login, no permission, a repository that is public although
    `private` is asked for, a change by somebody else in the meantime. UploadFailedError: the hub failed or
    cannot be reached.
    """
    name, revision = upload.facts.repository, upload.facts.revision
    remote = ask_remote(upload)
    check_visibility(upload, remote, private=private)
    opens, hidden = public and not private, remote.private

    def send() -> Pushed:
        nonlocal opens, hidden
        if not remote.exists:
            opens |= _create_private(name, private=private)
            hidden = True
        if revision is not None and remote.commit is None:
            _api().create_branch(name, branch=revision, exist_ok=True)
        kept = keeps_remote_card(upload, remote)
        info = _api().create_commit(
            name,
            _operations(upload, remote, without=CARD if kept else ""),
            commit_message=message or f"Upload a student with graftvit {version('graftvit')}",
            revision=revision,
            parent_commit=remote.commit,
        )
        if opens and hidden:
            _api().update_repo_settings(name, private=False)
            hidden = False
        return Pushed(str(info.commit_url), info.oid, info.oid != remote.commit, kept, hidden)

    try:
        return _explained(send, upload)
    except CheckpointError as error:
        if opens and hidden:
            error.args = (f"{error}; {name} is private until it is pushed with --public",)
        raise


def _create_private(name: str, *, private: bool) -> bool:
    """Create an empty private repository; return whether it would be public by its owner's default."""
    _api().create_repo(name, private=private or None)
    if _api().model_info(name).private:
        return False
    _api().update_repo_settings(name, private=True)
    return True


def _operations(
    upload: Upload, remote: Remote, without: str
) -> list[CommitOperationAdd | CommitOperationDelete]:
    _, removed = replaced_and_removed(upload, remote)
    added = [
        CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
        for file in upload.files
        if file.name != without
    ]
    return [*added, *(CommitOperationDelete(name) for name in removed)]


def _api() -> HfApi:
    return HfApi(library_name="graftvit", library_version=version("graftvit"))


def _explained(action: Callable[[], Result], upload: Upload) -> Result:
    """Run `action`, which talks to the hub; its errors in one sentence, none of which shows a token."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:
        cause = _cause(error)
        refused = _refused(cause, upload.facts.repository)
        if refused is not None:
            raise CheckpointError(refused) from error
        failed = _failed(cause)
        if failed is not None:
            reason, advice = failed
            name = upload.facts.repository
            raise UploadFailedError(f"{name} cannot be pushed: {reason}; {advice}", reason) from error
        if isinstance(cause, JSONDecodeError) or not isinstance(cause, (HfHubHTTPError, ValueError, OSError)):
            if not _is_of_client(cause):
                raise
            raise UploadFailedError(
                f"{constants.ENDPOINT} does not answer as a hub does: check HF_ENDPOINT"
            ) from error
        said = cause if isinstance(cause, HfHubHTTPError) else ValueError(" ".join(str(cause).split()))
        raise CheckpointError(f"{constants.ENDPOINT} refused the push: {line(said)}") from error


def _is_of_client(error: BaseException) -> bool:
    """Return whether the hub's client raised it while it read an answer, and not this package by a bug."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return not frames[-1].startswith("graftvit")


def _cause(error: BaseException) -> BaseException:
    """Return the error behind the client's "Error while uploading"."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _refused(error: BaseException, repository: str) -> str | None:
    """Return the sentence for an error that the user can fix."""
    status, owner = status_of(error), repository.partition("/")[0]
    if status == 401:
        what = "you are not logged in" if get_token() is None else "your token is refused"
        return f"{repository} cannot be pushed (401), {what}: `hf auth login` or set HF_TOKEN, a token that may write"
    if status == 403:
        return f"you may not write to {repository} (403): use a token that may write, of a member of {owner}"
    if status == 404:
        return f"{repository} cannot be pushed (404): there is no {owner} on {constants.ENDPOINT}, or no such branch"
    if status in (409, 412):
        return f"{repository} was changed by somebody else meanwhile ({status}): look at it, and push again"
    return None


def _failed(error: BaseException) -> tuple[str, str] | None:
    """Return a reason that may pass by itself, and what to do then."""
    status = status_of(error)
    again = "push again (what is uploaded already is not sent twice)"
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set", "unset it, or look with --dry_run"
    if status == 429:
        return f"{constants.ENDPOINT} limits the rate of requests", f"wait a while, then {again}"
    if status is not None and status >= 500:
        return f"{constants.ENDPOINT} fails with {status}", f"wait a while, then {again}"
    if is_network(error):
        return f"{constants.ENDPOINT} cannot be reached, or it hung up", f"check the network and {again}"
    return None
