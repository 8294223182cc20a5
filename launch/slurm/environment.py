"""Avoid behaviors of submitit that a run of several days must not depend on: one function each, seen in 1.5.4.

Not here because we do not use it: `Job.state`, `done` and `result` (they wait forever for a killed job without
accounting, and take NODE_FAIL as an end although the job is restarted), the count of time-outs (with a limit of ten
minutes or less, each preemption counts as one), and the pickle that `checkpoint` would write again at each requeue (a
kill in the middle leaves a file that makes every later requeue fail). The state of a run is in its own files.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import submitit
from submitit.helpers import clean_env
from submitit.local import local

from ...models.errors import RunFailedError
from ..launcher import PORTS

LOG_START = "GRAFTVIT_LOG_START"
"""The variable with the bytes that earlier attempts have written, as the script counts them, into the error log of the
script and of rank 0: srun tells there of a rank that fails at once, while the first rank still starts."""
REQUEUE_TRIES, REQUEUE_PAUSE = 4, 5.0
"""Orders to a controller that may be starting again, and seconds between two of them."""
INSIDE_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_script(code: str, launch: Path, python: str = shlex.quote(sys.executable)) -> str:
    """Return a shell script in place of the interpreter: it starts it on the copy of the package, signals blocked.

    `code` and `python` are words of the shell: a pack is somewhere else on each node.

    submitit installs its handlers after it has loaded the job. A SIGUSR2 before that ends the process, and the job
    fails instead of going on later; a blocked one waits. `early_signals.remember_signals` lets it through. An `env`
    that cannot block (coreutils before 8.31) leaves the gap as it is. The shell itself ignores both signals: a job that
    is preempted in its first moment is ended and started again by Slurm, and one that is to stop finds the request.

    submitit is started as a module, which would put the folder of the submission in front of the copy; python 3.11 and
    later does without. Where the copy is gone, the job ends instead of running what is installed by now.

    submitit gives a job what it runs after it has learned the job's number, and a submission that is killed before
    never does. Here the job takes it from the folder of its launch, and writes its number down where it is missing.
    """
    run, paths, place = python, code, shlex.quote(str(launch))
    return (
        "#!/bin/sh\n"
        "trap '' USR2 TERM\n"
        f'[ -d {paths} ] || {{ echo "the copy of the code is gone, submit again:" {paths} >&2; exit 1; }}\n'
        "number=${SUBMITIT_LOCAL_JOB_ID:-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}\n"
        "job=$number${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}\n"
        f'[ -s {place}/job ] || echo "$number" > {place}/job\n'
        f'[ -e {place}/"$job"_submitted.pkl ] ||\n'
        f'  ln -s "${{SLURM_ARRAY_TASK_ID:-0}}.pkl" {place}/"$job"_submitted.pkl 2>/dev/null\n'
        "export PYTHONSAFEPATH=1\n"
        f'export PYTHONPATH={paths}"${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        "if env --block-signal=USR2 true 2>/dev/null; then\n"
        f'  exec env --block-signal=USR2,TERM {run} "$@"\n'
        "fi\n"
        "trap - USR2 TERM\n"
        f'exec {run} "$@"\n'
    )


def forget_old_results() -> None:
    """Remove what an earlier attempt left as this process's result, whole or torn.

    submitit would give it out as the result of this attempt until that is through, and refuses to write beside a
    torn one. In a folder of an earlier cluster, whose job numbers begin at 1 again, it may be another job's.
    """
    if "SUBMITIT_FOLDER" not in os.environ:  # --cluster debug keeps its result to itself
        return
    path = submitit.JobEnvironment().paths.result_pickle
    for old in (path, path.with_suffix(path.suffix + ".save_tmp")):
        old.unlink(missing_ok=True)


def keep_results() -> None:
    """Create the folder of results again if somebody has removed it: submitit would treat that as a failure."""
    if "SUBMITIT_FOLDER" in os.environ:
        submitit.JobEnvironment().paths.folder.mkdir(parents=True, exist_ok=True)


def requeue() -> None:
    """Make the scheduler restart this job: the first rank asks once everything is saved. May not return.

    Slurm answers by sending SIGTERM to all processes of the step, `scontrol` itself among them. submitit takes its
    death for a failure and ends the job; here it, and this process, ignore the signal until the answer is there.

    Raises RunFailedError: the scheduler refused.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        for left in reversed(range(REQUEUE_TRIES)):
            job = submitit.JobEnvironment()
            try:
                if job.cluster == "slurm":  # `incomplete`: a job that was just cancelled stays cancelled
                    subprocess.check_call(["scontrol", "requeue", "incomplete", job.job_id], timeout=60)
                else:
                    job._requeue(0)  # the hook that every cluster of submitit has
                return
            except (subprocess.SubprocessError, OSError) as error:
                if not left:
                    raise RunFailedError(
                        f"the job cannot be requeued ({error}); `graftvit jobs resume` resumes from its state"
                    ) from error
            time.sleep(REQUEUE_PAUSE)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Submit as from a login node: a job that submits would hand its own allocation and ranks on.

    `clean_env` takes SLURM_CONF away with them, without which Slurm's commands may find no cluster, or another one.
    """
    configuration = os.environ.get("SLURM_CONF")
    with clean_env():
        if configuration is not None:
            os.environ["SLURM_CONF"] = configuration
        yield


@contextmanager
def detached(log: Path) -> Iterator[None]:
    """Let what is started inside outlive this process, its terminal and its Ctrl-C; what it says goes to `log`.

    submitit starts the controller of a local job as a child like any other: it would die with the terminal, and hold
    the end of a pipe open that somebody reads this command's output from.
    """
    module: Any = local
    plain = module.subprocess
    with log.open("ab") as file:
        apart = partial(
            subprocess.Popen, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        module.subprocess = SimpleNamespace(Popen=apart)
        try:
            yield
        finally:
            module.subprocess = plain


def export_ranks(restart: int) -> Mapping[str, str]:
    """Return RANK and related variables of this process, for torch; each attempt has its own port.

    submitit's port depends on the job alone: a process that the scheduler gave up may still hold it. Most of its ports
    are of the range in which Linux puts outgoing connections, and one of these may hold it as well. It would also
    refuse variables that are there, and hide the other devices of the node, among which accelerate chooses by itself.
    """
    ranks = submitit.helpers.TorchDistributedEnvironment()
    if ranks.world_size == 1:
        for name in INSIDE_A_LAUNCHER:
            os.environ.pop(name, None)
        return {}
    os.environ.pop("MASTER_PORT", None)
    ranks.export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_PORT"] = str(PORTS[(ranks.master_port + 7 * restart) % len(PORTS)])
    return {name: os.environ[name] for name in INSIDE_A_LAUNCHER}
