"""What a run on a cluster writes down: its submissions, its attempts, and the errors of their ranks.

    OUTPUT_DIR/jobs/submissions/0001.json   what was submitted, oldest first; written before the scheduler is told
    OUTPUT_DIR/jobs/attempts/0001.jsonl     what one attempt saw: one JSON object an event, written by its first rank
    OUTPUT_DIR/jobs/errors/0001-3.txt       how rank 3 of that attempt failed
    OUTPUT_DIR/jobs/stop                    a request to stop after the next save, and not to be requeued

An attempt is one time that the scheduler started the job. Each writes files of its own, so that an attempt that was
given up by its scheduler and still runs cannot spoil what the next one says.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...checkpoints.atomic import write_file
from ...models.errors import CheckpointError

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
    before: str = ""
    """Why the attempt before ended, where that could be found out only afterwards."""
    signal: str = ""
    """The signal that asked it to stop, and its reason, as in `SIGTERM (preempted)`."""
    outcome: Outcome | None = None
    """How it ended; None where it runs, or ended without a word (killed, or its node died)."""
    ended: float | None = None
    why: str = ""
    """The last words of a failed attempt."""


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
            if _read_submission(path).launch == launch:
                path.unlink()

    def submissions(self) -> list[Submission]:
        """All that were submitted, the oldest first. Raises CheckpointError for a damaged file."""
        older = self.folder / "submission.json"  # there was one file for all, which had the newest
        paths = [*([older] if older.exists() else []), *self._submission_paths()]
        return [_read_submission(path) for path in paths]

    def submission(self) -> Submission | None:
        """The newest; None where nothing was submitted. Raises CheckpointError for a damaged file."""
        return next(reversed(self.submissions()), None)

    def _submission_paths(self) -> list[Path]:
        return sorted((self.folder / "submissions").glob("[0-9]*.json"))

    def begin(self, **event: Any) -> int:
        """Writes the start of a new attempt, `number` and `started` aside, and returns its number."""
        folder = self.folder / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        number = max((int(path.stem) for path in folder.glob("*.jsonl")), default=0)
        while True:
            number += 1
            try:
                (folder / f"{number:04d}.jsonl").touch(exist_ok=False)
                break
            except FileExistsError:  # another attempt began at the same moment
                continue
        self.note(number, started=time.time(), **event)
        return number

    def note(self, number: int, **event: Any) -> None:
        """Adds fields of `Attempt` to what attempt `number` has written."""
        path = self.folder / "attempts" / f"{number:04d}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempts(self) -> list[Attempt]:
        """All attempts, the first one first."""
        found = []
        for path in sorted((self.folder / "attempts").glob("*.jsonl")):
            fields: dict[str, Any] = {"number": int(path.stem)}
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    fields |= json.loads(line)
                except ValueError:  # cut short by a crash
                    break
            if "started" in fields:
                found.append(Attempt(**fields))
        return found

    @property
    def finished(self) -> bool:
        """Whether the newest attempt ended the run."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].outcome == "finished"

    def write_error(self, number: int, rank: int, text: str) -> None:
        """How `rank` of attempt `number` failed."""
        path = self.folder / "errors" / f"{number:04d}-{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def errors(self, number: int) -> dict[int, str]:
        """Rank -> how it failed in attempt `number`."""
        paths = (self.folder / "errors").glob(f"{number:04d}-*.txt")
        return {int(path.stem.partition("-")[2]): path.read_text(encoding="utf-8") for path in paths}


def _read_submission(path: Path) -> Submission:
    """Its number is in the folder of its launch, where one file has it for all cells of an array."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("earlier", None)  # in older records
        found = Submission(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): submit the run again") from error
    if found.job_id or not found.launch:
        return found
    return replace(found, job_id=job_id(Path(found.launch), found.index))


def job_id(launch: Path, index: int | None) -> str:
    """The number of a job by the folder of its launch, once it is there; empty before."""
    try:
        number = (launch / "job").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return number if index is None or not number else f"{number}_{index}"
