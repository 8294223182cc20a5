"""Let only the newest attempt write a run folder.

A scheduler that loses a node restarts the job elsewhere while the old processes may still run, and a person may start
a command twice. Each attempt writes its own token into `fence.json`. An attempt that finds another token there has
been replaced, and stops before it writes anything more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...checkpoints.atomic import write_text
from ...checkpoints.files import read_json
from ...models.errors import ConfigError, GraftError, JsonDict, RunFailedError


class FencedError(RunFailedError):
    """Another attempt has taken over the run; this one must write nothing more."""


class Fence:
    """The right of one attempt to write into `folder`, until another attempt takes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "fence.json"
        self.token = uuid.uuid4().hex[:12]

    def take(self) -> None:
        """Take the right to write from every other attempt.

        Raises ConfigError: another job's process on this machine writes into the folder, or it cannot be created.
        """
        holder = self._read()
        if holder is not None and _works_here(holder):
            raise ConfigError(
                f"process {holder['pid']} is writing the run in {self.folder}: "
                "stop it first, or give another output_dir"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir={self.folder} cannot be written: {error.strerror}") from error
        write_text(self.path, json.dumps({"token": self.token, **_me()}) + "\n")

    def check(self) -> None:
        """Raise FencedError if another attempt has taken over the run, or the run folder is gone."""
        holder = self._read()
        if holder is None and not self.folder.is_dir():
            raise FencedError(
                f"{self.folder} is not there any more: it was moved or removed; this run writes nothing more"
            )
        if holder is None and not (self.folder / "config.yaml").exists():
            raise FencedError(f"files of the run in {self.folder} were removed; this run writes nothing more")
        if holder is None or holder["token"] != self.token:
            by = "another attempt" if holder is None else _describe(holder)
            raise FencedError(f"{by} has taken over the run in {self.folder}; this one writes nothing more")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Write only inside this block.

        Raises FencedError: another attempt has taken over the run. It is raised before the block, and in place of an
            error in it, because the other attempt removes unfinished files.
        """
        self.check()
        try:
            yield
        except (OSError, GraftError):
            self.check()
            raise

    @contextmanager
    def held(self) -> Iterator[Fence]:
        """Give the right back at the end of the block, so that nothing waits for a finished process."""
        try:
            yield self
        finally:
            holder = self._read()
            if holder is not None and holder["token"] == self.token:
                with contextlib.suppress(OSError):
                    self.path.unlink()
                    self.folder.rmdir()  # fails if the folder contains a run

    def _read(self) -> JsonDict | None:
        try:
            found = read_json(self.path)
        except GraftError:
            return None
        return found if isinstance(found, dict) and "token" in found else None


def _me() -> JsonDict:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "job": _job(),
    }


def _works_here(holder: JsonDict) -> bool:
    """Return whether the holder is another live process of this machine, and not an earlier attempt of this job."""
    if holder.get("boot") != _boot() or not holder.get("boot") or holder.get("pid") == os.getpid():
        return False
    if holder.get("job") is not None and holder.get("job") == _job():
        return False
    began = _began(int(holder["pid"]))
    return began is not None and began == holder.get("began")


def _describe(holder: JsonDict) -> str:
    job = holder.get("job")
    return f"process {holder.get('pid')} on {holder.get('host')}" + ("" if job is None else f" of job {job}")


def _job() -> str | None:
    """Return the scheduler's name of this job, the same in all its attempts."""
    return os.environ.get("SLURM_JOB_ID")


def _boot() -> str:
    """Return an identifier unique to this machine and its process table; empty if the system has none."""
    try:
        table = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + table
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """Return when a process started, in the system's ticks; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else fields[19]
