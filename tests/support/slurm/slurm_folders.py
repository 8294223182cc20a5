"""Run folders as a submission and its attempts leave them, and a scheduler that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import jobs, submit
from graftvit.launch.slurm.environment import INSIDE_A_LAUNCHER
from graftvit.launch.slurm.folder import Job, JobFolder
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.scheduler import NoAnswerError, State

HERE: dict[str, Any] = {"cluster": "debug", "gpus_per_node": 0}
SILENT = NoAnswerError("Slurm does not answer: asked 3 times in 29 seconds")
Answer = str | State | Exception | Mapping[str, str | State]


def submitted(folder: Path, **changes: Any) -> JobFolder:
    """As job 12, from its own folder."""
    files = JobFolder(folder)
    for made in (files.folder, folder / "logs"):
        made.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "job_id": "12", "cluster": "slurm", "submitted": 1.0, "command": ["train", str(folder / "config.yaml")],
        "logs": str(folder / "logs"), "resources": Request().model_dump(mode="json"), "code": "",
        "directory": str(folder),
    }  # fmt: skip
    files.write_job(Job(**{**values, **changes}))
    return files


def attempted(folder: Path, outcome: str | None = None, restart: int = 0, **event: Any) -> str:
    """One more attempt of job 12; without an outcome it ended, or goes on, without a word."""
    files = JobFolder(folder)
    name = files.begin(job_id="12", restart=restart, nodes=["n1"], world_size=1)
    if outcome is not None or event:
        files.note(name, **({} if outcome is None else {"outcome": outcome}), **event)
    return name


def be_a_task(patch: pytest.MonkeyPatch, folder: Path, **changes: int) -> None:
    """Let this process be a task of job 77, by default rank 1 of 4 on two nodes."""
    task = {"JOB_ID": 77, "NTASKS": 4, "JOB_NUM_NODES": 2, "NODEID": 0, "PROCID": 1, "LOCALID": 1, **changes}
    values = {f"SLURM_{name}": str(value) for name, value in task.items()}
    values |= {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(folder),
    }
    for name, value in values.items():
        patch.setenv(name, value)
    for name in (*INSIDE_A_LAUNCHER, "SLURM_ARRAY_JOB_ID"):
        patch.setenv(name, "")  # so that what a test exports is taken back, too
        patch.delenv(name)


def failing(error: BaseException) -> Callable[..., Any]:
    """A function that always fails so."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


class FakeSlurm:
    """What the scheduler says; the fixture `slurm`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def says(self, *answers: Answer) -> None:
        """Answer so of each job, or of those in a mapping alone: one answer a question, the last one for ever."""
        left = list(answers)

        def states(ids: Iterable[str], **_: object) -> dict[str, State]:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, Exception):
                raise answer
            return {
                job: _state(answer.get(job, "") if isinstance(answer, Mapping) else answer) for job in ids
            }

        for module in (jobs, submit):
            self._patch.setattr(module, "job_states", states)

    def numbers(self, number: str = "", error: Exception | None = None) -> None:
        """Know a job that was submitted by its name under this number, or fail."""
        by_name = failing(error) if error else lambda name, script: number
        for module in (jobs, submit):
            self._patch.setattr(module, "number_by_name", by_name)


def _state(said: str | State) -> State:
    return said if isinstance(said, State) else State(said) if said else State()
