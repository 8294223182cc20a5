"""Classify how a rank failed: by itself or because another rank did, and whether a restart may help.

When one rank dies, the others fail a moment later, with longer messages. Such errors of torch are recognized by their
text: the exception classes are too general, and some of them have changed.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...checkpoints.files import UnreadableError, read_regular
from ...models.errors import GraftError, LostLoaderError
from ...transfer.engine.fence import FencedError

Kind = Literal["cause", "consequence"]

AWAY = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ESHUTDOWN,
    errno.ENOLINK,
)  # fmt: skip
"""What the system reports about a file whose file system does not answer."""

_LASTING = r"ncclInvalidUsage|ncclInvalidArgument|Duplicate GPU detected|mismatch.*between ranks"
_NO_MEMORY = r"out of memory|OutOfMemoryError|can't allocate memory|Cannot allocate memory|MemoryError"
_LOST = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe|pair closure|Software caused connection abort"
    r"|Timed out waiting \d+ms for (recv|send) operation|Socket closed|socket timeout|recvValue failed"
    r"|failed to recv, got 0 bytes|wait timeout after \d+ms|client socket has timed out|Timed out after \d+ seconds"
    r"|waiting for clients|Connect timeout|Gloo connectFullMesh failed|Connection was likely closed"
    r"|NCCL communicator (was|is) (aborted|.*abort)|ncclRemoteError|ncclSystemError|ncclInProgress"
    r"|Watchdog caught collective operation timeout|remote process exited|Store is (closed|not available)"
    r"|DistBackendError|DistNetworkError|DistStoreError|heartbeat monitor|remote worker crashing"
    r"|socketProgress|Last error:"
)
"""What gloo, NCCL and torch's store report about a rank that does not answer, or about an aborted communicator."""
_MACHINE = (
    r"EADDRINUSE|address already in use|uncorrectable ECC|hardware error|fell off the bus|NVLink"
    r"|busy or unavailable|system not yet initialized|No CUDA GPUs are available|no CUDA-capable device"
    r"|ncclUnhandledCudaError|ncclInternalError|CUDA error: unknown error"
    r"|DataLoader worker \(pid\(?s?\)?.*(killed by signal: (Killed|Terminated)|exited unexpectedly)"
)
"""Errors whose reason is a machine, and not the run."""


@dataclass(frozen=True)
class Failure:
    """How a rank, or an attempt, failed."""

    rank: int | None = None
    """The rank that failed, or is to blame; None where none is known."""
    kind: Kind = "cause"
    """`cause`: by an error of its own; `consequence`: because another rank failed."""
    transient: bool = True
    """Whether a restart may help."""
    text: str = ""
    """The last words of the rank, or of the scheduler."""
    written: float = 0.0
    """Unix time."""
    why: str = ""
    """The reason in one line; empty without one."""
    state: str = ""
    """`node failed`, `failed`, `preempted` or `timed out` where Slurm said so; else only the ranks' files tell."""
    node: str = ""
    """The node of the rank, if known."""
    wait: int | None = None
    """Seconds after which the job starts again; None where it does not."""

    def to_text(self) -> str:
        """Return the text for a file: the error, and its kind in the last line."""
        kind = f"{self.kind}, {'may pass' if self.transient else 'will come again'}"
        return f"{self.text.rstrip()}\n({kind})\n"

    @property
    def last_words(self) -> str:
        """Its last line."""
        return (self.text.strip().splitlines() or [""])[-1]


def read_failure(path: Path) -> Failure:
    """Parse what `to_text` wrote; older files have no kind, and count as a cause that a restart does not remove."""
    text = read_regular(path, errors="replace", refusal=UnreadableError)
    found = re.search(r"\n\((cause|consequence), (may pass|will come again)\)\n$", text)
    kind: Kind = "consequence" if found and found[1] == "consequence" else "cause"
    return Failure(
        rank=int(path.stem.rpartition("-")[2]),
        kind=kind,
        transient=found is not None and found[2] == "may pass",
        text=text[: found.start() + 1] if found else text,
        written=path.stat().st_mtime,
    )


def classify(error: BaseException, *, saved: bool) -> tuple[Kind, bool]:
    """Return whether a rank failed by itself, and whether a restart may help.

    Args:
        error: As the rank raised it.
        saved: Whether the attempt has saved a new state. A run that came so far has memory enough, as a rule; one that
            has not will run out of it each time.
    """
    chain = list(_chain(error))
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain)
    if isinstance(error, FencedError):  # another attempt is at work
        return "cause", False
    if any(_is_away(one) or isinstance(one, LostLoaderError) for one in chain):
        return "cause", True
    if isinstance(error, GraftError) or _says(_LASTING, text):
        return "cause", False
    if _says(_NO_MEMORY, text):
        return "cause", saved
    if _says(_MACHINE, text):
        return "cause", True
    if _says(_LOST, text) or any(_is_of_torch(one) for one in chain):
        return "consequence", True
    return "cause", False


def is_consequence(text: str) -> bool:
    """Return whether the last error in the text of a rank is only a consequence of another rank's failure."""
    raised = [match.start() for match in re.finditer(r"^[\w.]*(Error|Exception)\b", text, re.MULTILINE)]
    return _says(_LOST, text[raised[-1] :] if raised else text)


def _says(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Return an error and the errors that caused it."""
    seen: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in seen:
        seen.append(now)
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)


def _is_away(error: BaseException) -> bool:
    """Return whether a file could not be reached; data workers and other languages give the error number as text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in AWAY
    numbers = re.findall(r"\[Errno (\d+)\]|\(os error (\d+)\)", str(error))
    return any(int(first or second) in AWAY for first, second in numbers)


def _is_of_torch(error: BaseException) -> bool:
    """Return whether torch.distributed raised it: DistError, DistBackendError, DistStoreError, DistNetworkError."""
    return any(parent.__name__ == "DistError" for parent in type(error).__mro__)
