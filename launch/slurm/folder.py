"""What a run on a cluster writes down: its submissions, its attempts, and the errors of their ranks.

    OUTPUT_DIR/jobs/config.yaml                 every setting, as submitted; beside that of a comparison, the recipe of
                                                its teacher, if that is a user's file
    OUTPUT_DIR/jobs/submissions/0001.json       what was submitted, oldest first; written before sbatch is called
    OUTPUT_DIR/jobs/launch-…/                   what its job needs to start, and the returned job number in `job`
    OUTPUT_DIR/jobs/code-…/                     the copy of the package that the job runs
    OUTPUT_DIR/jobs/{env,base,code}-….{tar,squashfs}  with `--pack`, and without `--pack_folder`: what nodes unpack
    OUTPUT_DIR/jobs/logs/1234_3_log.{out,err}   the output of rank 3 of job 1234, all attempts one after another
    OUTPUT_DIR/jobs/attempts/0001-1234.0.jsonl  the events of attempt 1: job 1234, restart 0; one JSON object a line,
                                                written by its first rank
    OUTPUT_DIR/jobs/errors/0001-1234.0-3.txt    how rank 3 of that attempt failed, under the kind of failure
    OUTPUT_DIR/jobs/stop-1234                   a request to job 1234 to stop after the next save
    OUTPUT_DIR/jobs/command.json                the command, where the job is not a run

An attempt is one start of the job by the scheduler. Each attempt writes its own files, with its identity in their
names. So an attempt that its scheduler has given up, and that still runs, cannot damage the files of the next one, not
even where somebody has removed `jobs/` in between.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...checkpoints.atomic import write_text
from ...checkpoints.files import (
    UnreadableError,
    append_line,
    open_lines,
    read_json,
    read_records,
    read_regular,
    safe_name,
)
from ...models.errors import CheckpointError
from ..submitted import SUBMITTED

Cluster = Literal["slurm", "local", "debug"]
Outcome = Literal["finished", "stopped", "requeued", "failed"]
Kind = Literal["cause", "consequence"]


@dataclass(frozen=True)
class Job:
    """A job that was submitted, or is about to be."""

    job_id: str
    """`123`, `123_4` for a cell of an array, a process number for `local`; empty where it is not known (yet)."""
    cluster: Cluster
    submitted: float
    """Unix time."""
    command: list[str]
    """Words after `graftvit` that the job runs."""
    logs: str
    """Folder of the logs, `<job_id>_<rank>_log.out` and `.err`."""
    resources: dict[str, Any]
    """The resources, as fields of `Request`."""
    code: str
    """Folder with the copy of the package that the job runs."""
    directory: str = "."
    """The folder that it was submitted from; relative paths of the run start there."""
    cpus_per_task: int = 1
    origin: dict[str, Any] = field(default_factory=dict)
    """Git revision and package versions of that code."""
    name: str = ""
    """The name of the job, by which the scheduler finds its number."""
    index: int | None = None
    """Place in the array; None for a job that is not in an array."""
    launch: str = ""
    """Folder of what was submitted together with it; its file `job` has the number. Empty without a record."""
    output_dir: str = ""
    """The run folder, as it was called at submission."""
    host: str = ""
    pid: int = 0
    """The process that submitted it, which is the run itself with `debug`."""

    @property
    def is_run(self) -> bool:
        """Return whether it is a run, and not another command, which saves no state."""
        return not self.command or self.command[0] not in SUBMITTED


@dataclass(frozen=True)
class Attempt:
    """One start of the job by the scheduler, as its first rank recorded it."""

    number: int
    job_id: str
    restart: int
    """How often the scheduler had started this job before."""
    nodes: list[str]
    world_size: int
    started: float
    name: str = ""
    """The name of its files: its number and its identity."""
    before: str = ""
    """Why the attempt before ended, where that could be found out only afterwards."""
    state: str | None = None
    """The saved state that it started from, as `newest_state` names it; None if unknown."""
    signal: str = ""
    """The signal that asked it to stop, and its reason, as in `SIGTERM (preempted)`."""
    outcome: Outcome | None = None
    """How it ended; None if it runs, or ended without a record (killed, or its node died)."""
    ended: float | None = None
    why: str = ""
    """The last words of an attempt that failed, or that was to be restarted after a failure."""
    log_start: int | None = None
    """Bytes of the first rank's error log that earlier attempts of the same job had written."""
    lost: int = 0
    """Steps that the attempt before had done after the state that this one starts from, as far as it logged them."""
    retried: bool = False
    """Whether it failed and the job is restarted because the failure may not happen again."""


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


NOTHING = Failure()


_JOB, _ATTEMPT = TypeAdapter(Job), TypeAdapter(Attempt)


class JobFolder:
    """The files of one run on a cluster."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / "jobs"

    def write_job(self, job: Job) -> None:
        """Add one, the newest. Raises WriteFailedError."""
        number = max((int(path.stem) for path in self._job_paths()), default=0) + 1
        text = json.dumps(asdict(job), indent=2) + "\n"
        write_text(self.folder / "submissions" / f"{number:04d}.json", text)

    def withdraw_job(self, launch: str) -> None:
        """Remove what was to be submitted with `launch`, and was not."""
        for path, job in self._readable():
            if job.launch == launch:
                path.unlink()

    def jobs(self) -> list[Job]:
        """Return all submissions, the oldest first, without damaged records.

        Those of a folder that was copied or moved belong to the run of its first name.
        """
        return [job for _, job in self._readable() if self._is_own(job)]

    def _readable(self) -> Iterator[tuple[Path, Job]]:
        for path in self._job_paths():
            with contextlib.suppress(CheckpointError):
                yield path, _read_job(path)

    def _is_own(self, job: Job) -> bool:
        return not job.output_dir or Path(job.output_dir).resolve() == self.output_dir.resolve()

    def job(self) -> Job | None:
        """Return the newest submission; None without one. Raises CheckpointError for a damaged file."""
        paths = self._job_paths()
        newest = _read_job(paths[-1]) if paths else None
        return newest if newest is not None and self._is_own(newest) else None

    def _job_paths(self) -> list[Path]:
        return sorted(path for path in (self.folder / "submissions").glob("*.json") if path.stem.isdigit())

    def asked_to_stop(self, job_id: str) -> bool:
        """Return whether a job has to end after its next save."""
        return self.stop_request(job_id).exists()

    def stop_request(self, job_id: str) -> Path:
        """Return the file that asks one job to stop; earlier and later jobs of this folder do not read it."""
        return self.folder / f"stop-{job_id}"

    def attempt_path(self, name: str) -> Path:
        """Return the file of an attempt, by its name."""
        return self.folder / "attempts" / f"{name}.jsonl"

    def begin(self, *, job_id: str, restart: int, **event: Any) -> str:
        """Write the start of a new attempt, and return the name of its files, which is unique."""
        numbers = map(_number, self._made("attempts").glob("*.jsonl"))
        name = f"{max(numbers, default=0) + 1:04d}-{job_id}.{restart}"
        self.note(name, **{"started": time.time(), "job_id": job_id, "restart": restart, **event})
        return name

    def note(self, name: str, **event: Any) -> None:
        """Add fields of `Attempt` to what the attempt with these files has written."""
        self._made("attempts")
        with open_lines(self.attempt_path(name)) as file:
            append_line(file, json.dumps(event))
            os.fsync(file.fileno())

    def attempts(self) -> list[Attempt]:
        """Return all attempts, the first one first; skip files that no attempt has written."""
        found = []
        for path in (self.folder / "attempts").glob("[0-9]*.jsonl"):
            with contextlib.suppress(ValidationError):
                found.append(_read_attempt(path))
        return sorted(found, key=lambda attempt: (attempt.number, attempt.started))

    @property
    def finished(self) -> bool:
        """Return whether the newest attempt ended the run."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].outcome == "finished"

    def write_failure(self, name: str, failure: Failure) -> None:
        """Write how a rank of the attempt with these files failed."""
        path = self._made("errors") / f"{name}-{failure.rank}.txt"
        path.write_text(failure.to_text(), encoding="utf-8")

    def _made(self, name: str) -> Path:
        """Create and return a folder in `jobs/`. Raises FileNotFoundError if the run folder itself was removed."""
        for folder in (self.folder, self.folder / name):
            folder.mkdir(exist_ok=True)
        return self.folder / name

    def failures(self, name: str) -> list[Failure]:
        """Return how ranks failed in an attempt: causes first, then consequences, each kind in the order of time."""
        paths = (self.folder / "errors").glob(f"{glob.escape(name)}-*.txt")
        found = [read_failure(path) for path in paths]
        return sorted(found, key=lambda failure: (failure.kind != "cause", failure.written))


_SAVED = (
    "checkpoints/last*",
    "checkpoints/previous*",
    "fit/*.safetensors",
    "targets.txt",
)
"""States, and what a run keeps before its first step: fitted layers, and the mark of a shard of teachers' targets."""
_KEPT = ("fit/*.safetensors", "cells/*/cell.json")
"""What `convert` and `programs search` keep where they write."""


def newest_state(output_dir: Path) -> str:
    """Return a name of the newest saved state, or of what is kept before it, of any stage; empty without one.

    The name holds the file server's time of writing: compare two names only for equality.
    """
    names = [f"{above}{name}" for above in ("", "*/", "*/*/") for name in _SAVED]
    paths = [path for name in names for path in output_dir.glob(name)]
    if output := read_output(output_dir):
        paths += [path for name in _KEPT for path in Path(output).glob(name)]
    times = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # `last` becomes `previous` at this moment
            times.append(path.stat().st_mtime_ns)
    return str(max(times, default=""))


def _read(path: Path) -> str:
    """Return the text of a file; UnreadableError, which a caller takes for any OSError."""
    return read_regular(path, errors="replace", refusal=UnreadableError)


def _number(path: Path) -> int:
    """Return the number of an attempt by its file."""
    found = re.match(r"[0-9]+", path.stem)
    return int(found[0]) if found else 0


def _read_attempt(path: Path) -> Attempt:
    """Read the record of an attempt.

    Raises ValidationError: the file does not say what an attempt says at its start. UnreadableError as `read_records`.
    """
    values: dict[str, Any] = {}
    for record in read_records(path, refusal=UnreadableError):
        values |= record
    return _ATTEMPT.validate_python({**values, "number": _number(path), "name": path.stem})


def _read_job(path: Path) -> Job:
    """Read a record, and its number from the folder of its launch, where one file has it for all cells of an array."""
    try:
        found = _JOB.validate_json(_read(path))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged ({error.errors()[0]['msg']}): `squeue --me` tells whether its job waits or runs; "
            "remove the file when it does not"
        ) from error
    number = found.job_id or (job_id(Path(found.launch), found.index) if found.launch else "")
    if number:  # it becomes a part of a path
        safe_name(number, f"{path}: the number of a job", refusal=CheckpointError)
    return replace(found, job_id=number)


def job_id(launch: Path, index: int | None) -> str:
    """Return the number of a job by the folder of its launch; empty until it is known."""
    try:
        number = _read(launch / "job").strip()
    except OSError:
        return ""
    return number if index is None or not number else f"{number}_{index}"


def write_number(launch: Path, number: str) -> None:
    """Record the job number of a launch. Raises WriteFailedError."""
    write_text(launch / "job", f"{number}\n")


ORDER_FILE = "command.json"
"""The file in `jobs/` that holds the submitted command."""


def read_output(folder: Path) -> str:
    """Return the absolute file or folder that a command writes; empty for a run, and for one that only prints."""
    try:
        return str(read_json(folder / "jobs" / ORDER_FILE, refusal=UnreadableError)["output"] or "")
    except (OSError, TypeError, LookupError):
        return ""


# The runs that this user has submitted, one absolute folder a line, for `graftvit jobs`.
#
# Lines are only added, so that two shells need no lock. A folder that is gone leaves the list.

logger = logging.getLogger(__name__)


def registry_file() -> Path:
    """`$XDG_STATE_HOME/graftvit/runs.txt`."""
    root = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(root) / "graftvit" / "runs.txt"


def remember(folder: Path) -> None:
    """Add a run. A home that cannot be written keeps no run from being submitted: then there is a warning."""
    path, folder = registry_file(), folder.absolute()
    if ".." in folder.parts:  # which behind a link leads elsewhere than the text says
        folder = folder.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_lines(path) as file:
            append_line(file, str(folder))
    except OSError as error:
        logger.warning("%s cannot be written (%s): name the run to `graftvit jobs`", path, error.strerror)


def known() -> list[Path]:
    """Return the runs that still exist, the last submitted one at the end."""
    try:
        lines = read_regular(registry_file(), errors="replace", refusal=UnreadableError).split("\n")
    except OSError:
        return []
    found = dict.fromkeys(Path(line) for line in reversed(lines) if line)
    return [folder for folder in reversed(found) if folder.is_dir()]
