"""Jobs without Slurm: processes of this machine, known by the folder of their run."""

from __future__ import annotations

import os
import signal
import socket
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
    return submission.job_id.isdigit() and int(submission.job_id) in controllers(Path(submission.logs))


def controllers(logs: Path) -> list[int]:
    """The processes that watch over the jobs with these logs: submitit's, or the shell that set it up."""
    found = {process.pid: process.info["ppid"] for process in _with_words(f"{CONTROLLER} {logs}")}
    return [pid for pid, parent in found.items() if parent not in found]


def is_ordered(script: Path) -> bool:
    """Whether an sbatch still runs with this script, as after the end of the command that started it."""
    return bool(_with_words(f" {script}"))


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
    children = {
        process.info["ppid"]: process.pid for process in _with_words(f"{CONTROLLER} {submission.logs}")
    }
    return int(children.get(job, job))


def _with_words(words: str) -> list[psutil.Process]:
    """Processes whose command line ends with `words`; a zombie has none."""
    everything = psutil.process_iter(["ppid", "cmdline"])
    return [one for one in everything if " ".join(one.info["cmdline"] or ()).endswith(words)]


def _is_older(pid: int, moment: float) -> bool:
    """Whether the process was there at that moment, and is no later one of the same number."""
    try:
        return pid > 0 and psutil.Process(pid).create_time() <= moment + SLACK
    except psutil.Error:
        return False
