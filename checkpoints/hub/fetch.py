"""One file of the hub into its cache: resumed where an earlier attempt was cut, its hash checked on the way in."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from ...models.errors import CheckpointError
from .retry import retried, status_of

CHUNK = 1 << 20


class DamagedError(Exception):
    """What was received is not what the hub announced."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub at one commit."""

    repository: str
    filename: str
    commit: str
    etag: str
    """Names the file in the cache: its sha256, or for a small file git's hash of it."""
    size: int | None

    @property
    def folder(self) -> Path:
        """Where the cache keeps the repository."""
        return folder_of(self.repository)

    @property
    def blob(self) -> Path:
        """Where the cache keeps the content."""
        return self.folder / "blobs" / self.etag


def folder_of(repository: str) -> Path:
    """Where the cache keeps a repository."""
    return Path(constants.HF_HUB_CACHE, "--".join(("models", *repository.split("/"))))


def fetch(file: RemoteFile) -> None:
    """Puts the content of `file` in the cache, where the client finds it; nothing to do if it is there.

    The client itself checks the length only, and from its version 2 on forgets what it had received when a
    download stops, as its xet transport does: all comes by plain requests here. The unfinished file is kept
    beside the blobs, one a machine, because a lock on a network file system may hold on one machine only.

    Raises CheckpointError: it came damaged twice. OSError, or the client's own errors: no connection, a
    refusal, a full disk.
    """
    lock = Path(constants.HF_HUB_CACHE, ".locks", file.folder.name, f"{file.etag}.lock")
    for folder in (lock.parent, file.blob.parent):
        folder.mkdir(parents=True, exist_ok=True)
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    partial = file.blob.with_name(f"{file.etag}.{machine}.graftvit.incomplete")
    with WeakFileLock(lock):
        if file.blob.exists():
            return
        try:
            _receive(file, partial)
        except DamagedError:  # a proxy, or the rest of another version: once more, from the start
            try:
                _receive(file, partial)
            except DamagedError as error:
                raise CheckpointError(
                    f"{file.filename} of {file.repository} came damaged twice and was removed: {error}; "
                    "try again later"
                ) from error
        partial.replace(file.blob)


def _receive(file: RemoteFile, partial: Path) -> None:
    """Fills `partial`; removes it again where it is not what was announced."""
    try:
        retried(lambda: _stream(file, partial), progress=lambda: _size(partial))
        check(partial, file.etag)
    except DamagedError:
        partial.unlink(missing_ok=True)
        raise


def _stream(file: RemoteFile, partial: Path) -> None:
    """One request for what is still missing of `partial`.

    Raises DamagedError: more came than was announced. ConnectionError: less.
    """
    # The address on the hub, never the signed one that it redirects to: that one expires. The transport
    # leaves the token out where it follows a redirect to another host.
    url = hf_hub_url(file.repository, file.filename, revision=file.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with partial.open("ab") as stream:
        have = stream.tell()
        if file.size is not None and have > file.size:
            raise DamagedError(f"{have:,} bytes instead of {file.size:,}")
        try:
            http_get(
                url, stream, resume_size=have, headers=headers,
                expected_size=file.size, displayed_filename=file.filename,
            )  # fmt: skip
        except OSError as error:
            if status_of(error) == 416:
                raise DamagedError(f"{have:,} bytes and no more to send") from error
            # The client says "consistency check failed" with a bare OSError; the length is looked at below.
            if type(error) is not OSError or error.errno is not None:
                raise
    have = _size(partial)
    if file.size is not None and have != file.size:
        counted = f"{have:,} bytes instead of {file.size:,}"
        raise DamagedError(counted) if have > file.size else ConnectionError(f"only {counted} came")


def check(path: Path, etag: str) -> None:
    """Raises DamagedError where `etag` is a hash of a known kind and the content has another one."""
    found = [_hash(path, name, head) for name, head in _kinds(etag, _size(path))]
    if found and etag.lower() not in found:
        raise DamagedError(f"its hash is {found[0]} instead of {etag}")


def _kinds(etag: str, size: int) -> list[tuple[str, bytes]]:
    """The hashes that an ETag may be: the name of the function, and what it starts from."""
    if re.fullmatch(r"[0-9a-fA-F]{64}", etag):
        return [("sha256", b"")]
    if re.fullmatch(r"[0-9a-fA-F]{40}", etag):  # git's on the hub, the file's own on some mirrors
        return [("sha1", b"blob %d\0" % size), ("sha1", b"")]
    return []


def _hash(path: Path, name: str, head: bytes) -> str:
    digest = hashlib.new(name, head, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
