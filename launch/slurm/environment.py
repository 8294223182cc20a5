"""Find which launcher started this process, and set the variables that torch needs.

torchrun and `accelerate launch` set RANK and related variables themselves. `srun` does not, and a run of eight tasks
would be eight runs in one folder. Two launchers at once are refused if they contradict each other.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import submitit
from submitit.helpers import clean_env
from submitit.local import local
from submitit.slurm import slurm

from ...models.errors import ConfigError, RunFailedError

LOG_START = "GRAFTVIT_LOG_START"
"""The variable with the bytes that earlier attempts have written into the error log of the script and of rank 0.

The script counts them: srun tells there of a rank that fails at once, while the first rank still starts.
"""
Environment = MutableMapping[str, str]
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20000, 32768)
"""The ports at which the processes of a run meet. Linux takes the ports of outgoing connections from 32768 on."""


def launcher(environment: Environment = os.environ) -> str:
    """`torchrun` (`accelerate launch` is one), `variables` (set by hand), `srun`, or `python`.

    Raises ConfigError: several processes were started in a way that would make several runs of them.
    """
    starter, started, rank = _starter(environment)
    if "TORCHELASTIC_RUN_ID" in environment:
        groups = int(environment.get("GROUP_WORLD_SIZE", "1"))
        if started not in (1, groups):
            raise ConfigError(
                f"{starter} started torchrun {started} times, but each of them knows of {groups} of them: give "
                "`srun --ntasks $SLURM_JOB_NUM_NODES --ntasks-per-node 1 torchrun --nnodes $SLURM_JOB_NUM_NODES ...`, "
                "or srun alone without torchrun"
            )
        return "torchrun"
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        _check_ranks(environment, starter, started, rank)
        return "variables"
    if starter == "srun" and started > 1:
        return "srun"
    if started > 1:
        raise ConfigError(
            f"{starter} started {started} processes, which would be {started} runs in one folder: "
            "start them with torchrun, accelerate launch or srun"
        )
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise ConfigError(
            "accelerate launch --cpu gives its processes no ranks, and each would be a run of its own in one folder: "
            "start them with torchrun, or give accelerate launch --num_processes 1 --num_machines 1"
        )
    return "python"


def prepare_process(environment: Environment = os.environ) -> None:
    """Set RANK and its like where srun started this process, and the number of threads. Before torch is loaded.

    Raises ConfigError as `launcher`.
    """
    kind = launcher(environment)
    if kind == "srun":
        environment.update(srun_ranks(environment))
    elif kind == "variables" and environment["WORLD_SIZE"] == "1":
        for name in NEEDED:  # one process needs no group, and a user who sets these need not have set all
            environment.pop(name, None)
    limit_threads(environment)


def refuse_several(command: str, environment: Environment = os.environ) -> None:
    """Raise ConfigError where several processes were started for a command that is one."""
    kind = launcher(environment)
    size = int(environment["SLURM_STEP_NUM_TASKS"] if kind == "srun" else environment.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ConfigError(
            f"`graftvit {command}` is one process, and {size} were started, which would write into the same folder: "
            "start one; `graftvit submit` makes a job of each cell of a comparison"
        )


def _starter(environment: Environment) -> tuple[str, int, str]:
    """Return the launcher of these parallel processes, their number, and the rank of this process."""
    tasks, rank = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("SLURM_PROCID", "")
    # the other tasks of `srun --pty bash` have ended
    interactive = "SLURM_PTY_PORT" in environment and os.isatty(0)
    if not rank or interactive:
        tasks = "1"
    if "OMPI_COMM_WORLD_SIZE" in environment:  # inside an allocation, srun starts its daemons, one a node
        return "mpirun", int(environment["OMPI_COMM_WORLD_SIZE"]), environment.get("OMPI_COMM_WORLD_RANK", "")
    pmi = environment.get("PMI_SIZE", "1"), environment.get("PMI_RANK", "")
    if int(pmi[0]) > 1 and pmi != (tasks, rank):  # `srun --mpi=pmi2` sets them, too
        return "mpirun", int(pmi[0]), pmi[1]
    return "srun", int(tasks), rank


def _check_ranks(environment: Environment, starter: str, started: int, rank: str) -> None:
    """Raise ConfigError where the variables that were set by hand are not complete, or are the same in all tasks."""
    size, own = environment.get("WORLD_SIZE", ""), environment.get("RANK", "0")
    numbers = size.isdecimal() and own.isdecimal() and int(own) < int(size)
    if not numbers or (size != "1" and any(name not in environment for name in NEEDED)):
        given = " ".join(f"{name}={environment.get(name, '')}" for name in NEEDED)
        raise ConfigError(
            f"{given}: set all of them, with RANK from 0 to WORLD_SIZE - 1, or start with torchrun or accelerate launch"
        )
    if int(size) < started or (int(size) == started > 1 and rank and own != rank):
        raise ConfigError(
            f"{starter} started {started} processes, and this one, {rank}, has RANK={own} and WORLD_SIZE={size} from "
            "its surroundings: unset RANK, WORLD_SIZE and LOCAL_RANK, and srun's own numbers are taken"
        )


def srun_ranks(environment: Environment) -> dict[str, str]:
    """Return the variables that torchrun would have set, from those that srun sets for its tasks."""
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    rank, local = environment["SLURM_PROCID"], environment.get("SLURM_LOCALID", "0")
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    # `4(x2),3` are two nodes with four tasks and one with three
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    runs = re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", counts)
    each = [count for count, times in runs for _ in range(int(times or 1))]
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    port = PORTS[(int(job) * 31 + int(step) * 7 + int(restart)) % len(PORTS)]
    return {
        "RANK": rank,
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": each[int(environment.get("SLURM_NODEID", "0"))],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or slurm._parse_node_list(nodes)[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def limit_threads(environment: Environment = os.environ) -> None:
    """OMP_NUM_THREADS from the allocation where it is not set.

    torch would take every core of the machine in each of its processes, and what is not this job's with them.
    """
    if "OMP_NUM_THREADS" in environment:
        return
    cores = environment.get("SLURM_CPUS_PER_TASK")
    local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if cores is None and local == 1:
        return
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment["OMP_NUM_THREADS"] = cores or str(max(1, allowed // local))


# Avoid behaviors of submitit that a run of several days must not depend on: one function each, seen in 1.5.4.
#
# Not here because we do not use it: `Job.state`, `done` and `result` (they wait forever for a killed job without
# accounting, and take NODE_FAIL as an end although the job is restarted), the count of time-outs (with a limit of ten
# minutes or less, each preemption counts as one), and the pickle that `checkpoint` would write again at each requeue (a
# kill in the middle leaves a file that makes every later requeue fail). The state of a run is in its own files.

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
                if (
                    job.cluster == "slurm"
                ):  # `incomplete`: a job that was cancelled at this moment stays cancelled
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
    with contextlib.suppress(KeyError):
        del os.environ["MASTER_PORT"]
    ranks.export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_PORT"] = str(PORTS[(ranks.master_port + 7 * restart) % len(PORTS)])
    return {name: os.environ[name] for name in INSIDE_A_LAUNCHER}
