"""Ask Slurm what the cluster has, and refuse a job that can never run, each mistake with its own sentence.

Slurm queues some impossible requests without a word (more nodes or cores than a partition has). If a node cannot see
the output folder, the job just dies without a log.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.files import nearest_folder
from ...models.errors import ConfigError, did_you_mean
from .scheduler import expand_nodes
from .settings import ClusterConfig, generic_in, gpus_in, has_gpus, most_of, parse_time

AT_WORK = (
    "idle", "mixed", "allocated", "completing", "planned", "powered_down", "powering_down", "powering_up",
)  # fmt: skip
"""States of a node that takes jobs, or will as soon as it is free; `~` and `#` mark one that has to be woken up."""


@dataclass(frozen=True)
class Node:
    """The resources of one machine of a partition."""

    name: str
    cpus: int
    memory: int
    """MiB."""
    gpus: Mapping[str, int]
    """The GPUs by type; "" if a node does not name the type."""
    away: str = ""
    """Why it takes no jobs now, for example `drained`; empty if it takes jobs."""
    generic: Mapping[str, int] = field(default_factory=dict)
    """Its other resources, for example {"tmpdisk": 100}."""


def partitions() -> dict[str, dict[str, str]]:
    """Name -> fields of each partition. Raises ConfigError."""
    found = {}
    for line in output("scontrol", "--oneliner", "show", "partition").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields:
            found[fields["PartitionName"]] = fields
    return found


def reserved_nodes(own: str | None) -> set[str]:
    """Return nodes that a reservation holds now, other than that in which the job runs. Raises ConfigError."""
    found: set[str] = set()
    for line in output("scontrol", "--oneliner", "show", "reservation").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("State") == "ACTIVE" and fields.get("ReservationName") != own:
            found.update(expand_nodes(fields.get("Nodes", "")))
    return found


def nodes_of(partition: str) -> list[Node]:
    """Return the nodes of a partition, in any state. Raises ConfigError."""
    nodes = {}
    for line in output("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%T|%G").splitlines():
        name, cpus, memory, state, generic = line.split("|")
        size = int(cpus.rstrip("+")), int(memory.rstrip("+"))
        nodes[name] = Node(name, *size, gpus_in(generic), _away(state), generic_in(generic))
    return list(nodes.values())


def _away(state: str) -> str:
    """`drained*` as drained, `idle~` as nothing."""
    word = re.sub(r"[^a-z_]", "", state.lower())
    if state.endswith("*"):
        return "down" if word in AT_WORK else word
    return "in maintenance" if state.endswith("$") else "" if word in AT_WORK else word


def output(*command: str) -> str:
    """Return what a Slurm command prints. Raises ConfigError if it fails."""
    answer = run(*command)
    if answer.returncode != 0:
        raise ConfigError(f"{command[0]} does not reach the cluster: {' '.join(answer.stderr.split())}")
    return answer.stdout


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command and return its result, also a failure. Raises ConfigError if it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{command[0]} does not answer: {error}") from error


OF_ONE_MACHINE = ("tmpfs", "ramfs", "devtmpfs")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # folders that no two machines share
UNCLEAR = ("Requested node configuration is not available", "Requested nodes are busy")
"""Said of nodes that do not exist, and of those that are drained, down or reserved."""
ALL_THE_SAME = "; `--unchecked` submits it all the same"
START = 60
"""Seconds that a run needs before it can save anything."""


def check_commands() -> None:
    """Raise ConfigError where there is no Slurm."""
    missing = [name for name in ("sbatch", "scontrol", "sinfo", "srun") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"--cluster slurm: no {', '.join(missing)} here; submit from a login node of the cluster, "
            "or give --cluster local to run in the background of this machine"
        )


def check_folder(output_dir: Path, config: ClusterConfig) -> None:
    """Raise ConfigError where the nodes of a job would not see `output_dir`, or nothing can be written there."""
    folder = output_dir.resolve()
    if "%" in str(output_dir):
        raise ConfigError(
            f"--output_dir {output_dir} has a %, which Slurm replaces in the names of logs: leave it out"
        )
    if config.shared_folders:
        if not any(folder.is_relative_to(root.resolve()) for root in config.shared_folders):
            roots = ", ".join(map(str, config.shared_folders))
            raise ConfigError(
                f"--output_dir {output_dir} is in none of the folders that every node sees "
                f"({config.origin('shared_folders')}: {roots})"
            )
    elif any(folder.is_relative_to(root) for root in TEMPORARY) or _file_system(folder) in OF_ONE_MACHINE:
        raise ConfigError(
            f"--output_dir {output_dir} is on this machine alone, and the nodes of the job would not see it: give a "
            "folder on a shared disk; if it is one, name it under shared_folders in the site file, or give --unchecked"
        )
    above = nearest_folder(folder)
    if not above.is_dir():
        raise ConfigError(f"--output_dir {output_dir} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output_dir} cannot be written: {above} is not yours to write")


def check_resources(config: ClusterConfig, cpus_per_task: int) -> None:
    """Raise ConfigError where the time is too short, or no partition that may be taken has what is asked for."""
    _check_time(config)
    cluster = partitions()
    problems = []
    for name in _asked_partitions(config, cluster):
        try:
            _check_partition(config, cpus_per_task, name, cluster[name])
        except ConfigError as error:
            problems.append(str(error))
        else:
            return
    raise ConfigError("; ".join(problems))


def _check_time(config: ClusterConfig) -> None:
    """Raise ConfigError if a run would be asked to save before it has done anything."""
    least = (config.signal_delay + START) // 60 + 1
    if config.minutes < least:
        raise ConfigError(
            f"{config.said('time')}: a run needs a minute to start, and is told to save {config.signal_delay} seconds "
            f"before its limit ({config.origin('signal_delay')}): give {least} minutes or more{ALL_THE_SAME}"
        )


def waits_for(config: ClusterConfig, cpus_per_task: int) -> str:
    """Return which nodes a job has to wait for, if too few of the nodes that fit can be used now; else nothing."""
    reserved, found = reserved_nodes(config.reservation), []
    for name in _asked_partitions(config, partitions()):
        fitting = [node for node in nodes_of(name) if not _lacks(node, config, cpus_per_task)]
        away = [node.away or "reserved" for node in fitting if node.away or node.name in reserved]
        if len(fitting) - len(away) >= config.nodes:
            return ""
        if len(fitting) >= config.nodes:
            every = f"all {len(fitting)}" if len(away) == len(fitting) else f"{len(away)} of {len(fitting)}"
            states = " or ".join(sorted(set(away)))
            which = f"{every} nodes of partition {name} that fit are"
            if len(fitting) == 1:
                which = f"the only node of partition {name} that fits is"
            found.append(f"{which} {states} now")
    return f"{', and '.join(found)}: the job waits for them" if found else ""


def _closed(config: ClusterConfig) -> str:
    """Return a note if all partitions of the request are down; sbatch takes such a job without a warning."""
    cluster = partitions()
    names = _asked_partitions(config, cluster)
    if any(cluster[name].get("State") != "DOWN" for name in names):
        return ""
    return f"partition {' and '.join(names)} is down now: the job waits for it"


def _asked_partitions(config: ClusterConfig, cluster: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the partitions of the request: those in the list, or the default one. Raises ConfigError."""
    if config.partition is not None:
        names = [name.strip() for name in config.partition.split(",")]
    else:
        names = [name for name, fields in cluster.items() if fields["Default"] == "YES"]
    if not names:
        raise ConfigError(
            f"--partition is not given and the cluster has no default one: valid: {', '.join(cluster)}"
        )
    for name in names:
        if name not in cluster:
            raise ConfigError(
                f"{config.said('partition')}: no partition of this cluster is called {name!r}; "
                f"{did_you_mean(name, cluster)}"
            )
    return names


def _check_partition(config: ClusterConfig, cpus_per_task: int, name: str, fields: Mapping[str, str]) -> None:
    limit = fields.get("MaxTime", "UNLIMITED")
    if limit not in ("UNLIMITED", "INFINITE", "NONE") and config.minutes > parse_time(limit):
        raise ConfigError(f"{config.said('time')}: partition {name} allows {limit} at most")
    nodes = nodes_of(name)
    if config.nodes > len(nodes):
        raise ConfigError(f"{config.said('nodes')}: partition {name} has {len(nodes)}{ALL_THE_SAME}")
    largest = fields.get("MaxNodes", "UNLIMITED")
    if largest.isdigit() and config.nodes > int(largest):
        raise ConfigError(
            f"{config.said('nodes')}: partition {name} gives a job {largest} at most{ALL_THE_SAME}"
        )
    _check_nodes(config, cpus_per_task, name, nodes)


def _check_nodes(config: ClusterConfig, cpus_per_task: int, partition: str, nodes: list[Node]) -> None:
    fitting = nodes
    for resource in _wanted(config, cpus_per_task):
        fitting = [node for node in fitting if resource.fits(node)]
        if len(fitting) < config.nodes:
            most = max(map(resource.most, nodes), default=0)
            having = f"{len(fitting)} of its {len(nodes)} nodes have so many"
            raise ConfigError(
                f"{resource.said}: partition {partition} has nodes with up to {most} "
                f"{resource.unit}, and {having}; {config.nodes} are asked for{resource.hint}"
            )


@dataclass(frozen=True)
class _Wanted:
    """The resources that each node of a job must have."""

    said: str
    unit: str
    fits: Callable[[Node], bool]
    most: Callable[[Node], int]
    hint: str = ""


def _wanted(config: ClusterConfig, cpus_per_task: int) -> list[_Wanted]:
    cores = cpus_per_task * config.tasks
    memory, size = _memory(config, cores)
    return [
        _wanted_gpus(config),
        *(_wanted_generic(config, name, count) for name, count in generic_in(config.gres).items()),
        _Wanted(
            f"{config.origin('cpus_per_task')} x tasks a node is {cores}",
            "cores",
            lambda node: node.cpus >= cores,
            lambda node: node.cpus,
            ALL_THE_SAME,
        ),
        _Wanted(
            f"{memory} is {size}",
            "MiB of memory",
            lambda node: node.memory >= size,
            lambda node: node.memory,
        ),
    ]


def _wanted_gpus(config: ClusterConfig) -> _Wanted:
    gpus, in_gres = config.gpus, bool(gpus_in(config.gres))
    of_types = " and ".join(filter(None, gpus))
    default = f"{config.origin('gpus_per_node')} is 1 by default"
    return _Wanted(
        config.said("gres") if in_gres else config.said("gpus_per_node") if config.gpus_per_node else default,
        f"GPUs of type {of_types}" if of_types else "GPUs",
        lambda node: has_gpus(node.gpus, gpus),
        lambda node: sum(
            count for kind, count in node.gpus.items() if not of_types or kind.lower() in map(str.lower, gpus)
        ),
    )


def _wanted_generic(config: ClusterConfig, name: str, count: int) -> _Wanted:
    return _Wanted(
        config.said("gres"),
        name,
        lambda node: most_of(node.generic, name) >= count,
        lambda node: most_of(node.generic, name),
        ALL_THE_SAME,
    )


def _memory(config: ClusterConfig, cores: int) -> tuple[str, int]:
    """Return which setting requests memory, and how many MiB a node must have."""
    if config.mem_per_cpu is not None:
        return f"{config.origin('mem_per_cpu')} x cores a node", _mebibytes(config.mem_per_cpu) * cores
    if config.mem_per_gpu is not None:
        return f"{config.origin('mem_per_gpu')} x GPUs a node", _mebibytes(
            config.mem_per_gpu
        ) * config.gpu_count
    return config.origin("mem"), _mebibytes(config.mem)


def _lacks(node: Node, config: ClusterConfig, cpus_per_task: int) -> bool:
    return not all(resource.fits(node) for resource in _wanted(config, cpus_per_task))


def ask_sbatch(script: Path, config: ClusterConfig, cpus_per_task: int) -> str:
    """Return what the job has to wait for, or nothing, as `sbatch --test-only` tells; nothing is queued.

    Of nodes that are drained or down it says what it says of nodes that do not exist, though sbatch takes the job.

    Raises ConfigError in Slurm's words where sbatch would refuse the script.
    """
    answer = run("sbatch", "--test-only", str(script))
    if answer.returncode == 0:
        return _closed(config)
    lines = [line for line in answer.stderr.splitlines() if "error" in line.lower()]
    line = lines[-1] if lines else answer.stderr.strip().partition("\n")[0]
    words = re.sub(r"^\s*(sbatch|allocation failure): *(error: *)?", "", line).strip()
    unclear = words in UNCLEAR
    if unclear and (waiting := waits_for(config, cpus_per_task)):
        return waiting
    hint = "; with `--unchecked` sbatch itself decides" if unclear else ""
    raise ConfigError(f"sbatch refuses the job: {words}{hint}; `--dry_run` prints the script")


def _mebibytes(text: str | None) -> int:
    digits = (text or "0").upper().removesuffix("B")
    unit = digits[-1] if digits[-1] in "KMGT" else "M"
    return (int(digits.removesuffix(unit)) << 10 * "KMGT".index(unit)) >> 10


def _file_system(folder: Path) -> str:
    """Return the kind of file system of `folder`, existing or not, by its kernel name; empty if unknown."""
    above = nearest_folder(folder)
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = {
        fields[1].replace("\\040", " "): fields[2] for fields in map(str.split, lines) if len(fields) > 2
    }
    inside = [point for point in mounts if above.is_relative_to(point)]
    return mounts[max(inside, key=len)] if inside else ""
