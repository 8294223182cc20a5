"""What a run on a cluster writes down: its submissions, its attempts, and the errors of their ranks.

    OUTPUT_DIR/jobs/submissions/0001.json       what was submitted, oldest first; written before sbatch is called
    OUTPUT_DIR/jobs/attempts/0001-1234.0.jsonl  the events of attempt 1: job 1234, restart 0; one JSON object a line,
                                                written by its first rank
    OUTPUT_DIR/jobs/errors/0001-1234.0-3.txt    how rank 3 of that attempt failed, under the kind of failure
    OUTPUT_DIR/jobs/stop-1234                   a request to job 1234 to stop after the next save; `stop`: to any job
    OUTPUT_DIR/jobs/command.json                the command, where the job is not a run

An attempt is one start of the job by the scheduler. Each attempt writes its own files, with its identity in their
names. So an attempt that its scheduler has given up, and that still runs, cannot damage the files of the next one, not
even where somebody has removed `jobs/` in between.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shlex
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ...checkpoints.atomic import write_file
from ...models.errors import CheckpointError
from ..hints import hint
from .failures import Failure, read_failure

Cluster = Literal["slurm", "local", "debug"]
Outcome = Literal["finished", "stopped", "requeued", "failed"]


@dataclass(frozen=True)
class Submission:
    """A job as it was submitted, or was about to be."""

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
    """Of `ClusterConfig`."""
    code: str
    """Folder with the copy of the package that the job runs."""
    directory: str = "."
    """Where it was submitted from, which relative paths of the run are meant from."""
    cpus_per_task: int = 1
    origin: dict[str, Any] = field(default_factory=dict)
    """Git revision and package versions of that code."""
    name: str = ""
    """Of the job, by which the scheduler is asked for its number."""
    index: int | None = None
    """Place in the array; None for a job that is none."""
    launch: str = ""
    """Folder of what was submitted together with it; its file `job` has the number. Empty in older records."""
    output_dir: str = ""
    """The run folder, as it was called then. Empty in older records."""
    inode: int = 0
    """Of that folder, by which one that was moved is told from a copy. 0 in older records."""
    host: str = ""
    pid: int = 0
    """The process that submitted it, which is the run itself with `debug`."""


@dataclass(frozen=True)
class Attempt:
    """One time that the scheduler started the job, as its first rank wrote it down."""

    number: int
    job_id: str
    restart: int
    """How often the scheduler had started this job before."""
    nodes: list[str]
    world_size: int
    started: float
    name: str = ""
    """Of its files: its number and its identity."""
    before: str = ""
    """Why the attempt before ended, where that could be found out only afterwards."""
    state: str | None = None
    """Which saved state it began from, as `newest_state` names it; None in older records."""
    signal: str = ""
    """The signal that asked it to stop, and its reason, as in `SIGTERM (preempted)`."""
    outcome: Outcome | None = None
    """How it ended; None where it runs, or ended without a word (killed, or its node died)."""
    ended: float | None = None
    why: str = ""
    """The last words of an attempt that failed, or that was to be started again although it had."""
    log_start: int | None = None
    """Bytes of the first rank's error log that earlier attempts of the same job had written."""
    retried: bool = False
    """Whether it failed, and the job is started again in the hope that this does not come again."""


def resumes(run: Path) -> str:
    """The command that goes on with a run: `graftvit resume`, where it has a record of how it was submitted."""
    return hint("resume" if JobFolder(run).submissions() else "submit", run)


class JobFolder:
    """The files of one run on a cluster."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / "jobs"
        self.stop_path = self.folder / "stop"

    def write_submission(self, submission: Submission) -> None:
        """Adds one, the newest. Raises WriteFailedError."""
        number = max((int(path.stem) for path in self._submission_paths()), default=0) + 1
        text = json.dumps(asdict(submission), indent=2) + "\n"

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        write_file(self.folder / "submissions" / f"{number:04d}.json", write, size=len(text))

    def withdraw_submission(self, launch: str) -> None:
        """Removes what was to be submitted with `launch`, and was not."""
        for path in self._submission_paths():
            with contextlib.suppress(CheckpointError):
                if _values(path).get("launch") == launch:
                    path.unlink()

    def submissions(self) -> list[Submission]:
        """All that were submitted, the oldest first, but for damaged records: Slurm knows their jobs by name.

        Those of a copy are the jobs of the run that it was copied from; a folder that was moved keeps its own.
        """
        found = []
        for path in self._all_paths():
            with contextlib.suppress(CheckpointError):
                if not self._is_copy(path):
                    found.append(_moved(_read_submission(path), self.output_dir))
        return found

    def _is_copy(self, path: Path) -> bool:
        folder = Path(_values(path).get("output_dir") or self.output_dir)
        first = folder / path.relative_to(self.output_dir)
        try:
            return not first.samefile(path) and first.read_bytes() == path.read_bytes()
        except OSError:  # it is there no more
            return False

    def submission(self) -> Submission | None:
        """The newest; None where nothing was submitted. Raises CheckpointError for a damaged file."""
        own = [path for path in self._all_paths() if not self._is_copy(path)]
        return _moved(_read_submission(own[-1]), self.output_dir) if own else None

    def _submission_paths(self) -> list[Path]:
        return sorted(path for path in (self.folder / "submissions").glob("*.json") if path.stem.isdigit())

    def _all_paths(self) -> list[Path]:
        older = self.folder / "submission.json"  # there was one file for all, which had the newest
        return [*([older] if older.exists() else []), *self._submission_paths()]

    def asked_to_stop(self, job_id: str) -> bool:
        """Whether a job has to end after its next save."""
        return self.stop_request(job_id).exists() or self.stop_path.exists()

    def stop_request(self, job_id: str) -> Path:
        """The file that asks one job to stop; a job that this folder had before, or has later, does not read it."""
        return self.folder / f"stop-{job_id}"

    def attempt_path(self, name: str) -> Path:
        """The file of an attempt, by its name."""
        return self.folder / "attempts" / f"{name}.jsonl"

    def begin(self, *, job_id: str, restart: int, **event: Any) -> str:
        """Writes the start of a new attempt, and returns the name of its files, which is unique."""
        folder = self._made("attempts")
        number = max((_number(path) for path in folder.glob("*.jsonl")), default=0)
        while True:
            number += 1
            name = f"{number:04d}-{job_id}.{restart}"
            try:
                self.attempt_path(name).touch(exist_ok=False)
                break
            except FileExistsError:  # another attempt began at the same moment
                continue
        self.note(name, **{"started": time.time(), "job_id": job_id, "restart": restart, **event})
        return name

    def note(self, name: str, **event: Any) -> None:
        """Adds fields of `Attempt` to what the attempt with these files has written."""
        self._made("attempts")
        with self.attempt_path(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempts(self) -> list[Attempt]:
        """All attempts, the first one first; a file that no attempt has written is passed by."""
        found = []
        for path in (self.folder / "attempts").glob("[0-9]*.jsonl"):
            with contextlib.suppress(TypeError):
                found.append(_read_attempt(path))
        return sorted(found, key=lambda attempt: (attempt.number, attempt.started))

    @property
    def finished(self) -> bool:
        """Whether the newest attempt ended the run."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].outcome == "finished"

    def write_failure(self, name: str, failure: Failure) -> None:
        """How a rank of the attempt with these files failed."""
        path = self._made("errors") / f"{name}-{failure.rank}.txt"
        path.write_text(failure.to_text(), encoding="utf-8")

    def _made(self, name: str) -> Path:
        """A folder in `jobs/`. Raises FileNotFoundError: the run folder itself is gone, and is not made anew."""
        for folder in (self.folder, self.folder / name):
            folder.mkdir(exist_ok=True)
        return self.folder / name

    def failures(self, name: str) -> list[Failure]:
        """How ranks failed in an attempt: those first that failed by themselves, each kind in the order of time."""
        paths = (self.folder / "errors").glob(f"{glob.escape(name)}-*.txt")
        found = [read_failure(path) for path in paths]
        return sorted(found, key=lambda failure: (failure.kind != "cause", failure.written))


def newest_state(output_dir: Path) -> str:
    """A name of the newest state that a run has saved, of whatever stage; empty where there is none.

    By its time of writing, which is the file server's: only whether two are the same has a meaning.
    """
    names = [
        f"{above}checkpoints/{name}.safetensors"
        for above in ("", "*/", "*/*/")
        for name in ("last", "previous")
    ]
    times = []
    for path in (path for name in names for path in output_dir.glob(name)):
        with contextlib.suppress(FileNotFoundError):  # `last` becomes `previous` at this moment
            times.append(path.stat().st_mtime_ns)
    return str(max(times, default=""))


def _number(path: Path) -> int:
    """Of an attempt by its file; older records have nothing else in their names."""
    found = re.match(r"[0-9]+", path.stem)
    return int(found[0]) if found else 0


def _read_attempt(path: Path) -> Attempt:
    """Raises TypeError: the file does not say what an attempt says at its start."""
    known = {one.name for one in fields(Attempt)}
    values: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values |= json.loads(line)
        except ValueError:  # cut short by a crash
            break
    values |= {"number": _number(path), "name": path.stem}
    return Attempt(**{name: value for name, value in values.items() if name in known})


def _values(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values.pop("earlier", None)  # in older records
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): submit the run again") from error
    return values


def _read_submission(path: Path) -> Submission:
    try:
        return Submission(**_values(path))
    except TypeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): submit the run again") from error


def _moved(found: Submission, here: Path) -> Submission:
    """With places as they are called now, and its number.

    The number is in the folder of the launch, where one file has it for all cells of an array.
    """
    before, now = Path(found.output_dir or here), here
    if before.resolve() != now.resolve():
        while before.name == now.name and before != before.parent:  # a sweep was moved, and this is a cell
            before, now = before.parent, now.parent

        def place(text: str) -> str:
            inside = bool(text) and Path(text).is_relative_to(before)
            return str(now / Path(text).relative_to(before)) if inside else text

        found = replace(found, logs=place(found.logs), launch=place(found.launch), code=place(found.code))
    if found.job_id or not found.launch:
        return found
    return replace(found, job_id=job_id(Path(found.launch), found.index))


def is_copied(found: Submission, here: Path) -> bool:
    """Whether a record has come to `here` with a copy of a run that has another name by now, or is gone."""
    before = Path(found.output_dir or here)
    try:
        return bool(found.inode) and before.resolve() != here.resolve() and here.stat().st_ino != found.inode
    except OSError:  # it has just been removed
        return False


def job_id(launch: Path, index: int | None) -> str:
    """The number of a job by the folder of its launch, once it is there; empty before."""
    try:
        number = (launch / "job").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return number if index is None or not number else f"{number}_{index}"


ORDER_FILE = "command.json"
"""In `jobs/`: what the job was submitted for."""


@dataclass(frozen=True)
class Order:
    """A command as it was submitted."""

    words: list[str]
    output: str | None
    """The file or folder that it writes, from `/`; None where it only prints."""

    @property
    def line(self) -> str:
        """As a user would type it."""
        return shlex.join(["graftvit", *self.words])


def read_order(folder: Path) -> Order | None:
    """What was submitted to a folder that is no run's; None for a run."""
    try:
        return Order(**json.loads((folder / "jobs" / ORDER_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
