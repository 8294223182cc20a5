"""Which launcher started this process, and what torch has to be told for it.

torchrun and `accelerate launch` set RANK and its like themselves. `srun` does not, and a run of eight tasks would be
eight runs in one folder. Two launchers at once are refused where they do not fit together.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping

from ...models.errors import ConfigError

Environment = MutableMapping[str, str]


def launcher(environment: Environment = os.environ) -> str:
    """`torchrun` (`accelerate launch` is one), `variables` (set by hand), `srun`, or `python`.

    Raises ConfigError: several processes were started in a way that would make several runs of them.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_PROCID" in environment else 1
    if "TORCHELASTIC_RUN_ID" in environment:
        groups = int(environment.get("GROUP_WORLD_SIZE", "1"))
        if tasks not in (1, groups):
            raise ConfigError(
                f"srun started torchrun {tasks} times, but each of them knows of {groups} of them: give "
                "`srun --ntasks-per-node 1 torchrun --nnodes $SLURM_JOB_NUM_NODES ...`, or srun alone without torchrun"
            )
        return "torchrun"
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return "variables"
    if tasks > 1:
        return "srun"
    size = int(environment.get("OMPI_COMM_WORLD_SIZE", environment.get("PMI_SIZE", "1")))
    if size > 1:
        raise ConfigError(
            f"mpirun started {size} processes, which would be {size} runs in one folder: "
            "start them with torchrun, accelerate launch or srun"
        )
    return "python"


def prepare_process(environment: Environment = os.environ) -> None:
    """Sets RANK and its like where srun started this process, and the number of threads. Before torch is loaded.

    Raises ConfigError as `launcher`, or where variables that were set by hand are not complete.
    """
    kind = launcher(environment)
    if kind == "srun":
        environment.update(srun_ranks(environment))
    elif kind == "variables":
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in environment]
        if missing and environment.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"{', '.join(name for name in needed if name in environment)} without {', '.join(missing)}: set all of "
                f"{', '.join(needed)} and LOCAL_RANK, or start with torchrun or accelerate launch"
            )
    limit_threads(environment)


def srun_ranks(environment: Environment) -> dict[str, str]:
    """What torchrun would have set, from what srun tells its tasks."""
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    rank, local = environment["SLURM_PROCID"], environment.get("SLURM_LOCALID", "0")
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    node = int(environment.get("SLURM_NODEID", "0"))
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return {
        "RANK": rank,
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": str(tasks_on_node(here, node)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment),
        "MASTER_PORT": environment.get("MASTER_PORT")
        or str(20000 + (int(job) * 31 + int(step) * 7 + int(restart)) % 20000),
    }


def first_host(environment: Environment) -> str:
    """The host of the first task of this step."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"scontrol cannot list the hosts of {nodes}: set MASTER_ADDR to the first of them"
        ) from error
    return answer.stdout.split()[0]


def tasks_on_node(counts: str, node: int) -> int:
    """Tasks of a node, from Slurm's `4(x2),3`: two nodes with four tasks, one with three."""
    each: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found:
            each += [int(found[1])] * int(found[2] or 1)
    return each[node] if node < len(each) else 1


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
    environment["OMP_NUM_THREADS"] = cores or str(max(1, len(os.sched_getaffinity(0)) // local))
