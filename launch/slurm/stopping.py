"""Ending a run early: after a save, or at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from ...models.errors import GraftError
from .files import JobFolder
from .jobs import RunStatus, describe_runs, run_folders
from .scheduler import cancel, signal_job


def stop(folder: Path, *, now: bool = False) -> list[str]:
    """Stops a run, or the cells of a sweep; one sentence for each that had a job.

    Args:
        folder: Of the run or the sweep.
        now: Without waiting for a save.

    Raises:
        ConfigError: if nothing was submitted to the folder.
        GraftError: if the scheduler does not take the order.
    """
    runs = describe_runs(run_folders(folder))
    return [_stop(run, now) for run in runs if run.active]


def _stop(run: RunStatus, now: bool) -> str:
    files = JobFolder(run.folder)
    files.folder.mkdir(parents=True, exist_ok=True)
    files.stop_path.touch()  # first: an attempt that is told to save looks for it afterwards
    job, go_on = f"job {run.job_id} of {run.folder}", f"`graftvit resume {run.folder}` goes on with it"
    if run.cluster == "slurm":
        waits = run.state in ("pending", "requeued")
        if now or waits:
            cancel(run.job_id)
            return f"{job} was {run.state} and is cancelled; {go_on}"
        signal_job(run.job_id, "USR2")
    else:
        # the controller of submitit passes SIGTERM on to its tasks, and kills them on SIGINT; it does not know SIGUSR2
        _signal_controller(int(run.job_id), signal.SIGINT if now else signal.SIGTERM)
        if now:
            return f"{job} is cancelled; {go_on}"
    return f"{job} saves at its next step and ends; {go_on}"


def _signal_controller(pid: int, number: int) -> None:
    """Sends a signal to submitit's controller, which is a child of `pid` where setup lines need a shell."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        children = []
    inner = [child for child in map(int, children) if b"submitit.local" in _words(child)]
    try:
        os.kill(inner[0] if inner else pid, number)
    except OSError as error:
        raise GraftError(f"process {pid} cannot be signalled: {error.strerror}") from error


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
