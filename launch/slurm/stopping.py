"""Stop runs early: after a save, or at once."""

from __future__ import annotations

import os
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoints.files import is_folder
from ...models.errors import ConfigError, GraftError
from ..load_config import load_config
from ..say import hint, say_aside
from ..submitted import SUBMITTED
from .batch import Launch, Request, job_name
from .checks import check_commands, check_folder, check_resources
from .job_folder import JobFolder, Submission, resumes
from .jobs import GONE, JudgedJob, current_stage, judge_jobs, run_folders
from .lock import submitting
from .lookup import home, stop_process
from .scheduler import NoSuchJobError, cancel, signal_job
from .settings import ClusterConfig
from .submission import refuse_active, start
from .submit import test_only

# Find unfinished runs in a folder and submit them again.

PATIENCE, EVERY = 600.0, 2.0
"""How many seconds `graftvit jobs resume` waits for a job that is stopping, and between two checks."""


@dataclass(frozen=True)
class Unfinished:
    """Runs of `folder` that neither finished nor have a job."""

    folder: Path
    submissions: dict[Path, Submission]
    """Run folder -> how it was submitted."""
    first: Request | None = None
    """The teacher of a comparison, which has to be trained first."""

    @property
    def resources(self) -> dict[str, Any]:
        """The resources of the earlier submission; Slurm may have forgotten a job that it waited for."""
        asked = next(iter(self.submissions.values())).resources
        kept = {name: value for name, value in asked.items() if name != "dependency"}
        options = {
            name: value for name, value in kept.get("sbatch", {}).items() if name != "kill_on_invalid_dep"
        }
        return {**kept, "sbatch": options} if "sbatch" in kept else kept


def find_unfinished(folder: Path) -> Unfinished:
    """Return the unfinished run, or the unfinished cells of a sweep or comparison.

    Raises ConfigError: nothing was submitted to `folder`, all has finished, or a job is at work on what has not.
    """
    folder = folder.absolute()
    submissions = {run: JobFolder(run).submission() for run in run_folders(folder)}
    lost = [run for run, submission in submissions.items() if submission is None]
    refuse_active(lost, folder)
    known = {run: submission for run, submission in submissions.items() if submission is not None}
    teacher = known.pop(folder / "teacher", None)
    if not known and teacher is not None:
        raise ConfigError(f"the cells of {folder} were never submitted: `graftvit submit` does that")
    if not known:
        raise ConfigError(
            f"{folder} has no record of how it was submitted: `{resumes(folder)}`, with the flags that it needs, "
            "resumes from what it has saved"
        )
    left = {run: submission for run, submission in known.items() if not JobFolder(run).finished}
    if not left:
        raise ConfigError(f"{folder} has finished: there is nothing to resume")
    jobs = judge_jobs(left, strict=True)
    active = {run: one for run, judged in jobs.items() for one in judged if one.active}
    free = {run: submission for run, submission in left.items() if run not in active}
    if not free:
        words = next(iter(active.values())).words.partition("_")[0]
        raise ConfigError(f"{folder} is {words} already: `{hint('jobs', folder)}` shows it")
    if teacher is None or JobFolder(folder / "teacher").finished:
        return Unfinished(folder, free)
    refuse_active([folder / "teacher"], folder)
    return Unfinished(folder, free, Request(teacher.command, folder / "teacher"))


def wait_for_stops(folder: Path, patience: float = PATIENCE) -> None:
    """Wait until jobs that are stopping have ended; after `patience` seconds they count as running."""
    until, told = time.monotonic() + patience, False
    while time.monotonic() < until:
        judged = judge_jobs(run_folders(folder), strict=True)
        ending = [
            one.words
            for run, jobs in judged.items()
            for one in jobs
            if one.state == "stopping" and JobFolder(run).asked_to_stop(one.submission.job_id)
        ]
        if not ending:
            return
        if not told:
            say_aside(f"graftvit: waiting for {ending[0]}, which was told to stop, to end\n")
        told = True
        time.sleep(EVERY)


def resume(unfinished: Unfinished, config: ClusterConfig, *, unchecked: bool = False) -> str:
    """Submit again, and say which jobs these are. Raises ConfigError as `graftvit submit`."""
    waits = ""
    if not unchecked:
        waits = check_again(unfinished, config)
        plan_again(unfinished, config)
    with submitting(home(unfinished.folder)):
        left = find_unfinished(unfinished.folder)  # another shell may have been quicker
        return start(launch_again(left, config), left.first, waits)


def go_back(unfinished: Unfinished) -> None:
    """Change to where the runs were submitted from: their relative paths are meant from there.

    Raises ConfigError: it is not there.
    """
    directory = Path(next(iter(unfinished.submissions.values())).directory)
    if not directory.is_dir():
        raise ConfigError(
            f"{unfinished.folder} was submitted from {directory}, which is not there any more, and relative paths in "
            f"its settings are meant from there: `{shlex.join(['mkdir', '-p', str(directory)])}`, with what they name"
        )
    os.chdir(directory)


def launch_again(unfinished: Unfinished, config: ClusterConfig) -> Launch:
    """Return the runs with their resources, from the folder that they were submitted from."""
    go_back(unfinished)
    first = next(iter(unfinished.submissions.values()))
    requests = [Request(submission.command, run) for run, submission in unfinished.submissions.items()]
    cores = config.cpus_per_task or first.cpus_per_task
    return Launch(job_name(unfinished.folder), unfinished.folder, requests, config, cores)


def check_again(unfinished: Unfinished, config: ClusterConfig) -> str:
    """Return what the job has to wait for, if anything. Raises ConfigError for what the cluster cannot give."""
    if config.cluster != "slurm":
        return ""
    check_commands()
    check_folder(unfinished.folder, config)
    launch = launch_again(unfinished, config)
    check_resources(config, launch.cpus_per_task)
    return test_only(launch)


def plan_again(unfinished: Unfinished, config: ClusterConfig) -> str:
    """Return the plan of the first started run, which describes all cells: they use the same number of processes.

    Raises ConfigError: so many processes cannot share its step, or the folder that it was submitted from is gone.
    """
    go_back(unfinished)
    stages = (current_stage(run) for run in unfinished.submissions)
    begun = next((stage for stage in stages if (stage / "config.yaml").is_file()), None)
    if begun is None:
        return ""
    say_aside("graftvit: checking whether the run can go on: its teacher, data and plan ...\n")
    from ..plan_text import describe_plan

    return describe_plan(load_config(begun), config.world_size)


ROUNDS = 3
"""How often a request to a job is repeated: it may have started, ended or been requeued in that moment."""
PAUSE = 0.5
"""Seconds between two rounds."""


@dataclass
class Stopped:
    """The result of stopping runs."""

    done: list[str] = field(default_factory=list)
    """A sentence for each job that was asked to end."""
    failed: list[str] = field(default_factory=list)
    """A sentence for each job that continues."""


def stop(folder: Path, *, now: bool = False) -> Stopped:
    """Stop all jobs of a run, or of the cells of a sweep; one that cannot be stopped keeps no other from it.

    Args:
        folder: Of the run or the sweep.
        now: Without waiting for a save.

    Raises:
        ConfigError: if nothing was submitted to the folder.
        GraftError: if Slurm does not answer.
    """
    runs = run_folders(folder)
    _wait_for_submissions(runs)
    made, told, ending = Stopped(), set[str](), list[str]()
    for place in range(ROUNDS):
        time.sleep(PAUSE if place else 0)
        made.failed, ending = [], []
        left = [(run, one) for run, one in _active(runs) if one.submission.job_id not in told]
        cancelled = _cancel_together(left, now)
        for run, one in left:
            job = one.submission.job_id
            try:
                _request(run, one)
                made.done.append(_stop(run, one, now, job in cancelled))
                told.add(job)
            except NoSuchJobError:  # where it is started again after all, it finds the request
                ending.append(f"{one.words} of {run} is ending already")
            except GraftError as error:
                made.failed.append(f"{one.words} of {run} continues: {error}")
        if not made.failed + ending:
            break
    made.done += ending
    return made


def _active(runs: list[Path]) -> list[tuple[Path, JudgedJob]]:
    judged = judge_jobs(runs, strict=True)
    return [(run, one) for run, jobs in judged.items() for one in jobs if one.active]


def _wait_for_submissions(runs: list[Path]) -> None:
    """Until a submission at this very moment is through, whose job has no number yet."""
    for top in dict.fromkeys(home(run) for run, one in _active(runs) if not one.submission.job_id):
        with submitting(top):
            pass


def _request(run: Path, one: JudgedJob) -> None:
    """Write the request to stop, before any signal: an attempt that is asked to save looks for it afterwards."""
    if not one.submission.job_id:
        raise ConfigError("it has no number yet; stop it again in a moment")
    if not is_folder(run):  # it could neither read the request nor save
        return
    files = JobFolder(run)
    request = files.stop_request(one.submission.job_id)
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        request.touch()
    except OSError as error:
        raise ConfigError(f"{request} cannot be written ({error.strerror}){_owner(run)}") from error


def _waits(one: JudgedJob) -> bool:
    """Return whether the job holds no node, or is suspended: it receives no signal."""
    return one.job.state == "SUSPENDED" or one.state in ("pending", "requeued")


def _cancel_together(jobs: list[tuple[Path, JudgedJob]], now: bool) -> set[str]:
    """Cancel what does not have to save, in one call; return the numbers.

    Jobs that wait come first: else each node that another one leaves is given to one of them. Where one cannot be
    cancelled, none is returned, and each is asked alone what the matter is.
    """
    ids = []
    for run, one in sorted(jobs, key=lambda pair: not _waits(pair[1])):
        if one.submission.cluster == "slurm" and (now or _waits(one) or not is_folder(run)):
            with suppress(GraftError):  # said where it is stopped alone
                _request(run, one)
                ids.append(one.submission.job_id)
    try:
        if ids:
            cancel(*ids)
    except GraftError:
        return set()
    return set(ids)


def _stop(run: Path, one: JudgedJob, now: bool, cancelled: bool) -> str:
    """Stop a job that was not `cancelled` with others, and return what was done."""
    submission = one.submission
    is_run = not submission.command or submission.command[0] not in SUBMITTED
    ends = "saves at its next step and ends" if is_run else "ends"
    job, go_on = (
        f"{one.words} of {run}",
        f"`{resumes(run)}` {'resumes it' if is_run else 'starts it again'}",
    )
    gone = not is_folder(run)
    if submission.cluster != "slurm":
        stop_process(submission, now=now or gone)
        if gone:
            return f"{job} was {one.state} and is cancelled; {GONE}"
        return f"{job} is cancelled; {go_on}" if now else f"{job} {ends}; {go_on}"
    if now or gone or _waits(one):
        if not cancelled:
            cancel(submission.job_id)
        state = "suspended" if one.job.state == "SUSPENDED" else one.state
        return f"{job} was {state} and is cancelled; {GONE if gone else go_on}"
    try:
        signal_job(submission.job_id, "USR2")
    except NoSuchJobError:  # it is already ending; its next attempt, if there is one, reads the request
        raise
    except GraftError:
        # no signal makes the job look: it is not stopping
        JobFolder(run).stop_request(submission.job_id).unlink(missing_ok=True)
        raise
    return f"{job} {ends}; {go_on}"


def _owner(run: Path) -> str:
    try:
        return f": it is the run of {run.owner()}"
    except (OSError, KeyError):
        return ""
