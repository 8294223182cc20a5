"""From a run and its resources to a job: the copy of the code, the order to the scheduler, the record."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import submitit

from ...checkpoints.atomic import write_file
from ...models.errors import ConfigError
from .attempt import Attempt
from .batch import Launch, Request, executor_of, script
from .checks import check_script
from .files import JobFolder, Submission
from .pitfalls import detached, outside_of_a_job, start_script
from .snapshot import copy_package, origin


def test_only(launch: Launch) -> None:
    """Raises ConfigError where sbatch would refuse the job. Nothing is queued, and nothing written to its folder."""
    with outside_of_a_job(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script(launch), encoding="utf-8")
        check_script(path)


def submit(launch: Launch) -> list[str]:
    """Submits, and returns the job of each request. What was submitted stands in each run folder.

    Raises ConfigError: the cluster refused.
    """
    code = copy_package(launch.folder / "jobs")
    directory = Path.cwd()
    attempts = [Attempt(request.words, request.output_dir, directory) for request in launch.requests]
    apart = detached(launch.logs / "controller.log") if launch.config.cluster == "local" else nullcontext()
    with outside_of_a_job():
        launch.logs.mkdir(parents=True, exist_ok=True)
        write_text(launch.start, start_script(code))
        executor = executor_of(launch)
        for request in launch.requests:
            JobFolder(request.output_dir).stop_path.unlink(missing_ok=True)
        try:
            with apart:
                jobs = (
                    executor.submit_array(attempts) if len(attempts) > 1 else [executor.submit(attempts[0])]
                )
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(f"the cluster refused the job: {' '.join(str(error).split())}") from error
    made = origin()
    for request, job in zip(launch.requests, jobs, strict=True):
        _record(launch, request, str(job.job_id), code, made)
    if launch.config.cluster == "debug":
        for job in jobs:
            job.results()
    return [str(job.job_id) for job in jobs]


def _record(launch: Launch, request: Request, job_id: str, code: Path, made: dict[str, Any]) -> None:
    folder = JobFolder(request.output_dir)
    before = folder.submission()
    folder.write_submission(
        Submission(
            job_id=job_id,
            cluster=launch.config.cluster,
            submitted=time.time(),
            command=request.words,
            logs=str(launch.logs),
            resources=launch.config.model_dump(mode="json"),
            code=str(code),
            directory=os.getcwd(),  # noqa: PTH109
            cpus_per_task=launch.cpus_per_task,
            origin=made,
            earlier=[] if before is None else [*before.earlier, before.job_id],
        )
    )


def write_text(path: Path, text: str) -> None:
    """A file of text, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write, size=len(text))
