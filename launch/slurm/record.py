"""What a task writes down of the attempt that it is part of. A record that cannot be written stops no training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import submitit

from ...models.errors import one_sentence
from .failures import Failure, classify
from .files import Attempt, JobFolder, newest_state
from .order import read_order
from .scheduler import fallen_nodes

SHORT_ATTEMPTS = 3
"""Attempts in a row that meet their time limit without a new state, after which there will be no other."""


class Record:
    """Of one task; all but the failures is for the first rank."""

    def __init__(self, folder: JobFolder, job: submitit.JobEnvironment, restart: int) -> None:
        self.folder, self.rank, self.restart = folder, job.global_rank, restart
        self.job_id, self.raw_job_id, self.cluster = job.job_id, job.raw_job_id, job.cluster
        self._warned = False
        self._earlier = folder.attempts()
        self._name = ""
        self._begun: dict[str, object] = {}
        if self.rank == 0:
            self._begin(job)

    def _begin(self, job: submitit.JobEnvironment) -> None:
        before = ""
        if self._earlier and self._earlier[-1].outcome in (
            None,
            "failed",
        ):  # who survived may have spoken first
            fallen = fallen_nodes(self._earlier[-1].nodes) if job.cluster == "slurm" else []
            before = f"node failure: {', '.join(fallen)}" if fallen else ""
        self._begun = {
            "started": time.time(),
            "job_id": self.job_id,
            "restart": self.restart,
            "nodes": list(job.hostnames),
            "world_size": job.num_tasks,
            "before": before,
            "state": newest_state(self.folder.output_dir),
            "log_start": _size(job.paths.stderr) if job.cluster == "slurm" else None,
        }
        self._name = self.folder.begin(**self._begun)  # type: ignore[arg-type]

    @property
    def asked_to_stop(self) -> bool:
        """Whether `graftvit stop` was told to end this job."""
        return self.folder.asked_to_stop(self.job_id)

    def note(self, **event: object) -> None:
        """Adds to the attempt's file, which is made anew where somebody has removed it."""
        if self.rank != 0:
            return
        gone = not self.folder.attempt_path(self._name).exists()
        fields = {**self._begun, **event} if gone else event
        self._written(lambda: self.folder.note(self._name, **fields))

    def fail(self, error: BaseException, text: str) -> None:
        """Writes down how this rank failed: `text`, and its kind."""
        kind, transient = classify(error, saved=self._has_saved())
        self._fail(Failure(self.rank, kind, transient, text))

    def fail_for_good(self, text: str) -> None:
        """Writes down what will come again."""
        self._fail(Failure(self.rank, "cause", False, text))

    def _fail(self, failure: Failure) -> None:
        self._written(lambda: self.folder.write_failure(self._files(), failure))
        self.note(why=one_sentence(failure.last_words)[:500])

    def too_short(self) -> str:
        """Why no other attempt is worth it once this one has met its time limit; empty where it is."""
        now = newest_state(self.folder.output_dir)
        if now != self._begun.get("state"):
            return ""
        if not now:
            through = (
                "the first step" if read_order(self.folder.output_dir) is None else "the command was through"
            )
            return f"the time limit ended before {through}: give a longer --time"
        short = [one for one in self._of_this_job() if one.state == now and "time limit" in one.signal]
        count = len([one for one in short if one.name != self._name]) + 1
        if count < SHORT_ATTEMPTS:
            return ""
        return (
            f"{count} attempts in a row met the time limit before they saved a new state: give a longer --time, or "
            "make the start of the run shorter; `graftvit resume` goes on from the last state"
        )

    def _has_saved(self) -> bool:
        try:
            began = next((one.state for one in self._of_this_job() if one.name == self._files()), None)
            return began is not None and newest_state(self.folder.output_dir) != began
        except OSError:
            return False

    def _of_this_job(self) -> list[Attempt]:
        return [one for one in self.folder.attempts() if one.job_id == self.job_id]

    def _files(self) -> str:
        """The name of the attempt's files, which the first rank has given it, as a rule before another one fails."""
        if self._name:
            return self._name
        over = {one.name for one in self._earlier if one.outcome is not None}
        same = [one for one in self._of_this_job() if one.restart == self.restart and one.name not in over]
        if same:
            return same[-1].name
        number = self._earlier[-1].number + 1 if self._earlier else 1
        return f"{number:04d}-{self.job_id}.{self.restart}"

    def _written(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._warned:
                sys.stderr.write(
                    f"graftvit: rank {self.rank}: the record of this attempt is not written: {error}\n"
                )
            self._warned = True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
