"""Jobs without Slurm: processes of this machine, known by the folder of their run."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from ...models.errors import GraftError
from .files import Submission

CONTROLLER = "submitit.local._local"
SLACK = 2.0
"""Seconds by which the system's time of a process's start may be late."""


def is_alive(submission: Submission) -> bool:
    """Whether the process of a `local` or `debug` job runs on this machine."""
    if submission.cluster == "debug":
        elsewhere = submission.pid in (0, os.getpid()) or submission.host != socket.gethostname()
        return not elsewhere and _is_older(submission.pid, submission.submitted)
    try:
        words = psutil.Process(int(submission.job_id)).cmdline()
    except (ValueError, psutil.Error):
        return False
    return " ".join(words).endswith(
        f"{CONTROLLER} {submission.logs}"
    )  # else the number is another process's by now


def controllers() -> dict[Path, list[int]]:
    """Folder of logs -> the processes that watch over its jobs: submitit's, or the shell that set it up."""
    found: dict[Path, dict[int, int]] = {}
    for process in _processes():
        _, is_one, logs = _line(process).partition(f"{CONTROLLER} ")
        if is_one:
            found.setdefault(Path(logs), {})[process.pid] = process.info["ppid"]
    return {logs: [pid for pid, parent in pids.items() if parent not in pids] for logs, pids in found.items()}


def is_ordered(script: Path) -> bool:
    """Whether an sbatch still runs with this script, as after the end of the command that started it."""
    return any(_line(process).endswith(f" {script}") for process in _processes())


def stop_process(submission: Submission, *, now: bool = False) -> None:
    """Tells a `local` or `debug` job to save and end, or to end. Raises GraftError: it is another user's."""
    pid = submission.pid if submission.cluster == "debug" else _innermost(submission)
    # submitit's controller passes SIGTERM on to its tasks, and kills them on SIGINT; it does not know SIGUSR2
    try:
        os.kill(pid, signal.SIGINT if now else signal.SIGTERM)
    except ProcessLookupError:  # it has just ended
        return
    except OSError as error:
        raise GraftError(f"process {pid} cannot be signalled: {error.strerror}") from error


def _innermost(submission: Submission) -> int:
    """submitit's controller, which is a child of the job's process where setup lines need a shell."""
    job = int(submission.job_id)
    try:
        children = psutil.Process(job).children()
        return next((one.pid for one in children if CONTROLLER in one.cmdline()), job)
    except psutil.Error:
        return job


def _processes() -> Iterator[psutil.Process]:
    return iter(psutil.process_iter(["ppid", "cmdline"]))


def _line(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())  # a zombie has none


def _is_older(pid: int, moment: float) -> bool:
    """Whether the process was there at that moment, and is no later one of the same number."""
    try:
        return pid > 0 and psutil.Process(pid).create_time() <= moment + SLACK
    except psutil.Error:
        return False
