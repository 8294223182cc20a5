"""Find which launcher started this process, and set what torch and the collector of garbage need.

torchrun and `accelerate launch` set RANK and related variables themselves. `srun` does not, and a run of eight tasks
would be eight runs in one folder. Two launchers at once are refused if they contradict each other.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
from collections.abc import MutableMapping

from ..models.errors import ConfigError

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
    from submitit.slurm.slurm import _parse_node_list  # here: few processes are started by srun

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
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _parse_node_list(nodes)[0],
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


# How often Python searches for garbage while a command runs.


def collect_seldom() -> None:
    """Let this process search for garbage seldom, and not at its end.

    To import torch and timm makes a million objects and no garbage: searching them, and clearing them one by one at
    the end, takes as long as the imports themselves.
    """
    gc.set_threshold(20_000, 20, 20)
    atexit.register(_clear_nothing)


def _clear_nothing() -> None:
    """Keep what is there out of the last search, unless a library would print that it was not cleared.

    Libraries built with nanobind do so, such as triton since torch 2.15. Their classes have a metaclass of this name.
    """
    if not any(kind.__name__.startswith("nb_type") for kind in type.__subclasses__(type)):
        gc.freeze()
