"""Turn a run and its resources into a job: copy the code, write the record, call sbatch, record the number."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission

from ...checkpoints.atomic import write_text
from ...models.errors import ConfigError, GraftError
from ..say import hint
from .attempt import JobTask
from .batch import Launch, Request, command, copy_package, executor_of, job_name, origin, script
from .checks import ask_sbatch
from .job_folder import JobFolder, Submission
from .lock import InterruptedSubmissionError, ordering, unbroken
from .lookup import UNSURE, number_by_name, write_number
from .pitfalls import detached, outside_of_a_job, start_script

logger = logging.getLogger(__name__)
ANSWER = 120.0
"""Seconds that sbatch may take to answer."""
_NUMBER = re.compile(r"^(?:Submitted batch job )?([0-9]+)(?:;.*| on .*)?$", re.MULTILINE)
"""The job number in sbatch's output, among a site's own lines; a wrapper of sbatch may not know `--parsable`."""


def test_only(launch: Launch) -> str:
    """Ask sbatch what the job has to wait for, if anything. Nothing is queued, and nothing written to its folder.

    Raises ConfigError: sbatch would refuse the job.
    """
    with outside_of_a_job(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script(launch), encoding="utf-8")
        return ask_sbatch(path, launch.config, launch.cpus_per_task)


def submit(launch: Launch) -> list[str]:
    """Submit, and return the job of each request. Each run folder records what was submitted.

    Raises:
        ConfigError: if the cluster refused.
        GraftError: if it is not known whether the cluster took the job.
        InterruptedSubmissionError: if it did, and this command was told to end meanwhile.
    """
    code, made = copy_package(launch.folder / "jobs"), origin()
    if launch.config.cluster == "debug":
        return _run(launch, code, made)
    if launch.config.cluster == "local":
        return [_order(_alone(launch, request), code, made) for request in launch.requests]
    number = _order(launch, code, made)
    return [f"{number}_{index}" for index in range(len(launch.requests))] if _is_array(launch) else [number]


def _alone(launch: Launch, request: Request) -> Launch:
    """Submit a cell that is started alone, and has its own folder for all files of its job."""
    folder = request.output_dir
    return Launch(job_name(folder), folder, [request], launch.config, launch.cpus_per_task)


def _order(launch: Launch, code: Path, made: dict[str, Any]) -> str:
    """Return the number of the job. Slow work comes first; the part that a signal must not cut is short."""
    _prepare(launch, code)
    with outside_of_a_job(), unbroken() as held:
        _record(launch, code, made)
        try:
            number = _sbatch(launch) if launch.config.cluster == "slurm" else _start(launch)
        except ConfigError:
            _withdraw(launch)
            raise
        try:
            write_number(launch.place, number)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): the job is found by its name", launch.place, error.strerror
            )
    if held:
        raise InterruptedSubmissionError(held[0], number, launch.folder)
    return number


def _prepare(launch: Launch, code: Path) -> None:
    """Write all that the job reads: a job finds it even if its number never reached us."""
    launch.logs.mkdir(parents=True, exist_ok=True)
    directory = Path.cwd()
    write_text(launch.start, start_script(code, launch.place))
    write_text(
        launch.place / "runs.json", json.dumps([str(request.output_dir) for request in launch.requests])
    )
    if launch.config.cluster == "slurm":
        write_text(launch.place / "submit.sh", script(launch))
    for index, request in enumerate(launch.requests):
        delayed = DelayedSubmission(JobTask(request.words, request.output_dir, directory))
        delayed.set_timeout(launch.config.minutes, 0)
        delayed.dump(launch.place / f"{index}.pkl")


def _record(launch: Launch, code: Path, made: dict[str, Any], job_id: str = "") -> None:
    """Record the intention, in each run folder."""
    for index, request in enumerate(launch.requests):
        folder = JobFolder(request.output_dir)
        request.output_dir.mkdir(parents=True, exist_ok=True)
        folder.stop_path.unlink(missing_ok=True)
        for one in folder.submissions():
            if not one.job_id:  # an interrupted one, of which no job has come: the caller has asked
                folder.withdraw_submission(one.launch)
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
                name=launch.name,
                index=index if _is_array(launch) else None,
                launch=str(launch.place),
                output_dir=str(request.output_dir.absolute()),
                inode=request.output_dir.stat().st_ino,
                host=socket.gethostname(),
                pid=os.getpid(),
            )
        )


def _withdraw(launch: Launch) -> None:
    for request in launch.requests:
        JobFolder(request.output_dir).withdraw_submission(str(launch.place))


def _sbatch(launch: Launch) -> str:
    """Order the job.

    Raises ConfigError: it is refused; GraftError: neither sbatch nor the queue tells whether it is.
    """
    words = ["sbatch", "--parsable", str(launch.place / "submit.sh")]
    said = f"gave no answer within {ANSWER:.0f} seconds"
    with contextlib.suppress(subprocess.TimeoutExpired):
        # in its own session it receives no Ctrl-C
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER,
            start_new_session=True,
        )
        numbers = _NUMBER.findall(done.stdout)
        if done.returncode == 0 and len(numbers) == 1:
            return str(numbers[0])
        said = " ".join(done.stderr.split() if done.returncode else ()) or f"exit code {done.returncode}"
    try:
        number = number_by_name(launch.place)  # an answer may be lost, and the job be queued
    except GraftError as error:
        raise GraftError(
            f"sbatch: {said}; whether the job is queued is not known: `{hint('jobs', launch.folder)}` tells when "
            f"Slurm answers again"
        ) from error
    if number:
        return number
    if _may_be_queued(said):
        (launch.place / UNSURE).touch()
        raise GraftError(
            f"sbatch: {said}; the job may be queued all the same: `{hint('jobs', launch.folder)}` tells in some minutes"
        )
    raise ConfigError(f"the cluster refused the job: {said}")


def _may_be_queued(said: str) -> bool:
    """Return whether the request reached the controller, and the answer was lost."""
    return any(
        words in said.lower()
        for words in ("timed out", "send/recv", "zero bytes", "gave no answer", "exit code 0")
    )


def _start(launch: Launch) -> str:
    """Start the job on this machine."""
    executor: Any = executor_of(launch)._executor
    with detached(launch.logs / "controller.log"):
        return str(executor._submit_command(command(launch)).job_id)


def _run(launch: Launch, code: Path, made: dict[str, Any]) -> list[str]:
    """Run each in this process."""
    ordering()
    jobs = []
    for request in launch.requests:
        one = replace(launch, requests=[request])
        with outside_of_a_job():
            job = executor_of(one).submit(JobTask(request.words, request.output_dir, Path.cwd()))
            _record(one, code, made, str(job.job_id))
        jobs.append(job)
    for job in jobs:
        job.results()
    return [str(job.job_id) for job in jobs]


def _is_array(launch: Launch) -> bool:
    return len(launch.requests) > 1
