"""Run folders as a submission and its attempts leave them, and a scheduler that says what a test wants."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import jobs
from graftvit.launch.slurm.job_folder import JobFolder, Submission
from graftvit.launch.slurm.scheduler import JobState
from graftvit.launch.slurm.settings import ClusterConfig

HERE: dict[str, Any] = {"cluster": "debug", "gpus_per_node": 0}


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


def attempted(folder: Path, outcome: str | None) -> None:
    """One more attempt; None for one that ended without a word."""
    files = JobFolder(folder)
    name = files.begin(job_id="12", restart=0, nodes=["n1"], world_size=1)
    if outcome is not None:
        files.note(name, outcome=outcome)


def say(monkeypatch: pytest.MonkeyPatch, state: str, of: Iterable[str] | None = None) -> None:
    """The scheduler says `state` of these jobs, or of all, and knows no other."""
    known = None if of is None else set(of)

    def states(ids: Iterable[str], **_: object) -> dict[str, JobState]:
        return {job: JobState(state) if known is None or job in known else JobState() for job in ids}

    monkeypatch.setattr(jobs, "job_states", states)
