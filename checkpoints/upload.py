"""Send a student to the hub in one commit, with one sentence for each failure."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from json import JSONDecodeError
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor

from ..models.errors import CheckpointError, Json, JsonDict, RunFailedError, check_types
from ..models.given import HoldsBody, Model
from .architecture import is_ours
from .card import (
    CardFacts,
    Claim,
    DescribeTransfer,
    claim_license,
    is_generated,
    license_of_card,
    plain_transfer,
    section,
    student_card,
)
from .files import place, read_json, read_regular
from .hub import download, is_network, line, status_of
from .licenses import public
from .one_file import FILE, for_timm, for_transformers, modeling_file
from .provenance import Pretrained
from .report import some
from .sources import CONFIG, PICKLE_SUFFIXES, STUDENTS, split_part
from .student import save
from .weight_files import outline, weight_map

# Collect what would go to the hub from a student's folder: files, card, license. Send nothing.

CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXTS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
"""Go up where they are there: some licenses ask that their text goes with the weights."""
REPLACED = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|modeling_graftvit\.py")
"""What a push takes from the hub where it does not bring it."""


@dataclass(frozen=True)
class UploadFile:
    """One file of the commit, from the disk or made here."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Upload:
    """A student that may be pushed."""

    facts: CardFacts
    config: Json
    """config.json, without paths of this machine and with the license."""
    claim: Claim
    files: tuple[UploadFile, ...]
    left_behind: tuple[str, ...]
    """What else lies in the folder."""
    card: str
    own_card: bool
    """Whether the card is the folder's own, written or edited by a person."""
    needs_package: str
    """Why there is no file by which the model loads without graftvit; empty if there is one, or timm needs none."""


@contextmanager
def student_folder(model: Model | Pretrained) -> Iterator[Path]:
    """Yield a student folder unchanged; for a run, or a model in memory, the folder that `save` writes of it.

    Raises as `save`.
    """
    if isinstance(model, HoldsBody):
        raise CheckpointError(
            "a detector or segmenter is not pushed: save it, and send its folder by `hf upload`"
        )
    if isinstance(model, str | PathLike):
        run, _ = split_part(os.fspath(model))
        _refuse_head(run, run / "student")
        if (run / CONFIG).is_file() or not any((run / name).is_dir() for name in ("checkpoints", "student")):
            yield run
            return
    with TemporaryDirectory(prefix="graftvit-push-") as temporary:
        yield save(model, Path(temporary) / "student")


def _refuse_head(*folders: Path) -> None:
    """Raise CheckpointError for the folder of a detector or segmenter."""
    heads = (folder / name for folder in folders for name in ("detector.json", "segmenter.json"))
    head = next((path for path in heads if path.is_file()), None)
    if head is not None:
        raise CheckpointError(
            f"{head} is of a detector or segmenter, and a push sends a classifier alone: send its folder by `hf upload`"
        )


@check_types()
def plan_upload(
    folder: str | PathLike[str],
    repository: str,
    *,
    license: str | None = None,
    confirm_license: bool = False,
    revision: str | None = None,
    dataset_name: str | None = None,
    describe_transfer: DescribeTransfer = plain_transfer,
) -> Upload:
    """Return what `push_student` would send; works without a network.

    Args:
        folder: a student folder: config.json and weights in safetensors.
        repository: `org/name` on the hub.
        license: hub identifier; by default the one that the student carries from the weights it was made from.
        confirm_license: the user has made sure that a laxer license, or one for unknown terms, may be named.
        revision: branch, main by default.
        dataset_name: what to call the data of the results in the card.
        describe_transfer: the card's rows for what was taken from the teacher.

    Raises CheckpointError: the folder holds no whole student, the name is invalid, a file is a link that leads
    out of the folder, or the license is refused.
    """
    _check_repository(repository)
    folder = place(folder)
    _refuse_head(folder)
    config = _config(folder)
    weights = _weights(folder)
    claim = claim_license(config, license, confirmed=confirm_license)
    own = _own_card(folder)
    if own is not None:
        claim = replace(claim, license=license_of_card(own, claim, CARD))
    alone, needs_package = _modeling(config, asked=(folder / FILE).is_file())
    facts = CardFacts(
        repository,
        claim.license,
        revision=None if revision == "main" else revision,
        parameters=sum(map(_parameters, weights)),
        sharded=len(weights) > 1,
        alone=bool(alone),
        dataset_name=dataset_name,
        describe_transfer=describe_transfer,
    )
    config = _published(for_transformers(config) if alone else for_timm(config), claim.license)
    card = own if own is not None else student_card(config, facts)
    files = [UploadFile(path.name, path) for path in weights]
    files += [UploadFile(INDEX, _inside(folder, INDEX))] if facts.sharded else []
    files += [UploadFile(name, _inside(folder, name)) for name in TEXTS if (folder / name).is_file()]
    files += [UploadFile(FILE, alone.encode())] if alone else []
    files.append(UploadFile(CONFIG, (json.dumps(config, indent=2) + "\n").encode()))
    files.append(UploadFile(CARD, card.encode()))
    names = {file.name for file in files}
    left = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in names)
    return Upload(facts, config, claim, tuple(files), tuple(left), card, own is not None, needs_package)


def _modeling(config: Json, *, asked: bool) -> tuple[str, str]:
    """Return the file by which a model of ours loads without graftvit, or why it cannot be written."""
    if not asked and not is_ours(config["architecture"]):
        return "", ""
    try:
        return modeling_file(config), ""
    except CheckpointError as error:
        return "", str(error)


def _check_repository(repository: str) -> None:
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise CheckpointError(
            f"{repository!r} is no repository name: write org/name, of letters, digits, '-', '_' and '.'"
        )


def _config(folder: Path) -> JsonDict:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r} to push; check the path")
    if not (folder / CONFIG).is_file():
        runs = [name for name in STUDENTS if (folder / name / CONFIG).is_file()]
        hint = f"it is a run, push {folder / runs[0]}" if runs else "a finished run writes one"
        raise CheckpointError(f"{folder} is not a student folder, because it has no {CONFIG}: {hint}")
    config = read_json(_inside(folder, CONFIG))
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{folder / CONFIG} names no architecture: it is not that of a student")
    return config


def _weights(folder: Path) -> list[Path]:
    """Return the files with the weights, after checking each."""
    if (folder / WEIGHTS).exists():
        return [_inside(folder, WEIGHTS)]
    if (folder / INDEX).exists():
        index = weight_map(_inside(folder, INDEX))
        paths = [_inside(folder, name) for name in sorted(set(index.values()))]
        held = {name for path in paths for name in _described(path)}
        absent = sorted(index.keys() - held)
        if absent:
            raise CheckpointError(f"{folder / INDEX} lists {some(absent)}, which its files do not hold")
        return paths
    other = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    hint = f"; `graftvit checkpoint convert` makes one of {other[0]}" if other else ""
    raise CheckpointError(f"{folder} has no {WEIGHTS}, and nothing else goes up{hint}")


def _inside(folder: Path, name: str) -> Path:
    """Return a file of the folder. CheckpointError: it is not there, not a file, or a link that leads out."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is not there or not a file: the student is not whole")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link that leads out of its folder: put a copy in its place")
    return path


def _described(path: Path) -> dict[str, Tensor]:
    """Return the tensors without their numbers, from the header."""
    found = outline(path)
    if found.format != "safetensors":
        raise CheckpointError(f"{path} is no safetensors file")
    return found.tree


def _parameters(path: Path) -> int:
    return sum(tensor.numel() for tensor in _described(path).values() if tensor.is_floating_point())


def _own_card(folder: Path) -> str | None:
    """Return the card of the folder if a person wrote or edited it."""
    if not (folder / CARD).exists():
        return None
    card = read_regular(_inside(folder, CARD))
    return None if is_generated(card) else card


def _published(config: Json, license: str | None) -> JsonDict:
    """config.json for others: no path of this machine, and the license that the card has."""
    shown = public(config) | {"model_args": config.get("model_args", {})}
    described = {key: value for key, value in section(shown, "pretrained_cfg").items() if key != "license"}
    return shown | {"pretrained_cfg": described | ({"license": license} if license else {})}


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
    stale = [name for name in remote.files if name not in names and REPLACED.fullmatch(name)]
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


@check_types()
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
