"""Run folders as a submission and its attempts leave them, and a scheduler that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import jobs, lookup
from graftvit.launch.slurm.batch import job_name
from graftvit.launch.slurm.job_folder import JobFolder, Submission
from graftvit.launch.slurm.lookup import NamedJob
from graftvit.launch.slurm.scheduler import JobState, NoAnswerError
from graftvit.launch.slurm.settings import ClusterConfig

HERE: dict[str, Any] = {"cluster": "debug", "gpus_per_node": 0}
SILENT = NoAnswerError("Slurm does not answer: asked 3 times in 29 seconds")
Answer = str | JobState | Exception | Mapping[str, str | JobState]


def submitted(folder: Path, **changes: Any) -> JobFolder:
    """As job 12, from its own folder."""
    files = JobFolder(folder)
    for made in (files.folder, folder / "logs"):
        made.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "job_id": "12", "cluster": "slurm", "submitted": 1.0, "command": ["train", str(folder / "config.yaml")],
        "logs": str(folder / "logs"), "resources": ClusterConfig().model_dump(mode="json"), "code": "",
        "directory": str(folder),
    }  # fmt: skip
    files.write_submission(Submission(**{**values, **changes}))
    return files


def attempted(folder: Path, outcome: str | None = None, restart: int = 0, **event: Any) -> str:
    """One more attempt of job 12; without an outcome it ended, or goes on, without a word."""
    files = JobFolder(folder)
    name = files.begin(job_id="12", restart=restart, nodes=["n1"], world_size=1)
    if outcome is not None or event:
        files.note(name, **({} if outcome is None else {"outcome": outcome}), **event)
    return name


def job_of(folder: Path, job_id: str = "7", state: str = "") -> NamedJob:
    """The job of a run as the queue has it under its name."""
    more = {"state": state} if state else {}
    return NamedJob(job_id, job_name(folder), folder / "jobs" / "launch-0" / "submit.sh", 1.0, **more)


class FakeSlurm:
    """What the scheduler says; the fixture `slurm`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def says(self, *answers: Answer) -> None:
        """Answer so of each job, or of those in a mapping alone: one answer a question, the last one for ever."""
        left = list(answers)

        def states(ids: Iterable[str], **_: object) -> dict[str, JobState]:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, Exception):
                raise answer
            return {
                job: _state(answer.get(job, "") if isinstance(answer, Mapping) else answer) for job in ids
            }

        self._patch.setattr(jobs, "job_states", states)

    def queue(self, *found: NamedJob, error: Exception | None = None) -> None:
        """List these jobs by their names, or fail."""

        def listed() -> list[NamedJob]:
            if error is not None:
                raise error
            return list(found)

        self._patch.setattr(lookup, "queued_jobs", listed)
        self._patch.setattr(lookup.shutil, "which", lambda _: "/usr/bin/squeue")


def _state(said: str | JobState) -> JobState:
    return said if isinstance(said, JobState) else JobState(said) if said else JobState()
