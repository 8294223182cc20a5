"""What can be known to be wrong before a job is queued, each with its own sentence.

Slurm lets some impossible requests wait for ever (more nodes or cores than a partition has), and tells of a folder that
its nodes cannot see by a job that dies without a log.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...models.errors import ConfigError, did_you_mean
from .settings import ClusterConfig, parse_time

OF_ONE_MACHINE = ("tmpfs", "ramfs", "devtmpfs")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # folders that no two machines share


@dataclass(frozen=True)
class Node:
    """What a machine of a partition has."""

    name: str
    cpus: int
    memory: int
    """MiB."""
    gpus: int


def check_commands() -> None:
    """Raises ConfigError where there is no Slurm."""
    missing = [name for name in ("sbatch", "scontrol", "sinfo", "srun") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"--cluster slurm: no {', '.join(missing)} here; submit from a login node of the cluster, "
            "or give --cluster local to run in the background of this machine"
        )


def check_folder(output_dir: Path, config: ClusterConfig) -> None:
    """Raises ConfigError where the nodes of a job would not see `output_dir`, or nothing can be written there."""
    folder = output_dir.resolve()
    if "%" in str(output_dir):
        raise ConfigError(
            f"--output_dir {output_dir} has a %, which Slurm replaces in the names of logs: leave it out"
        )
    if config.shared_folders:
        if not any(folder.is_relative_to(root.resolve()) for root in config.shared_folders):
            roots = ", ".join(map(str, config.shared_folders))
            raise ConfigError(
                f"--output_dir {output_dir} is in none of the folders that every node sees (shared_folders: {roots})"
            )
    elif any(folder.is_relative_to(root) for root in TEMPORARY) or _file_system(folder) in OF_ONE_MACHINE:
        raise ConfigError(
            f"--output_dir {output_dir} is on this machine alone, and the nodes of the job would not see it: give a "
            "folder on a shared disk; if it is one, name it under shared_folders in the site file"
        )
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f"--output_dir {output_dir} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output_dir} cannot be written: {above} is not yours to write")


def check_resources(config: ClusterConfig, cpus_per_task: int) -> None:
    """Raises ConfigError where no nodes of the partition have what is asked for."""
    partitions = _partitions()
    name = config.partition or next(
        (name for name, fields in partitions.items() if fields["Default"] == "YES"), None
    )
    if name is None:
        raise ConfigError(
            f"--partition is not given and the cluster has no default one: valid: {', '.join(partitions)}"
        )
    if name not in partitions:
        raise ConfigError(
            f"--partition {name!r} is not one of this cluster; {did_you_mean(name, partitions)}"
        )
    limit = partitions[name].get("MaxTime", "UNLIMITED")
    if limit not in ("UNLIMITED", "INFINITE", "NONE") and config.minutes > parse_time(limit):
        raise ConfigError(f"--time {config.time} is more than partition {name} allows, {limit}")
    nodes = _nodes(name)
    if config.nodes > len(nodes):
        raise ConfigError(f"--nodes {config.nodes}: partition {name} has {len(nodes)}")
    largest = partitions[name].get("MaxNodes", "UNLIMITED")
    if largest.isdigit() and config.nodes > int(largest):
        raise ConfigError(f"--nodes {config.nodes}: partition {name} gives a job {largest} at most")
    _check_nodes(config, cpus_per_task, name, nodes)


def _check_nodes(config: ClusterConfig, cpus_per_task: int, partition: str, nodes: list[Node]) -> None:
    wanted = [
        ("--gpus_per_node", config.gpus_per_node, "gpus", "GPUs"),
        ("--cpus_per_task x tasks a node", cpus_per_task * config.tasks, "cpus", "cores"),
        ("--mem", _mebibytes(config.mem), "memory", "MiB of memory"),
    ]
    fitting = nodes
    for flag, count, attribute, unit in wanted:
        fitting = [node for node in fitting if getattr(node, attribute) >= count]
        if len(fitting) < config.nodes:
            most = max((getattr(node, attribute) for node in nodes), default=0)
            having = f"{len(fitting)} of its {len(nodes)} nodes have so many"
            raise ConfigError(
                f"{flag} is {count}: partition {partition} has nodes with up to {most} {unit}, "
                f"and {having}; {config.nodes} are asked for"
            )


def check_script(script: Path) -> None:
    """Raises ConfigError in Slurm's words where sbatch would refuse the script. Nothing is queued."""
    answer = _run("sbatch", "--test-only", str(script))
    if answer.returncode != 0:
        lines = [line for line in answer.stderr.splitlines() if "error" in line.lower()]
        line = lines[-1] if lines else answer.stderr.strip().partition("\n")[0]
        words = re.sub(r"^\s*(sbatch|allocation failure): *(error: *)?", "", line).strip()
        raise ConfigError(f"sbatch refuses the job: {words}; `--dry_run` prints the script")


def _partitions() -> dict[str, dict[str, str]]:
    found = {}
    for line in _output("scontrol", "--oneliner", "show", "partition").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields:
            found[fields["PartitionName"]] = fields
    return found


def _nodes(partition: str) -> list[Node]:
    nodes = {}
    for line in _output("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G").splitlines():
        name, cpus, memory, generic = line.split("|")
        counts = re.findall(r"gpu(?::[\w.-]+)?:(\d+)", generic)
        nodes[name] = Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), sum(map(int, counts)))
    return list(nodes.values())


def _mebibytes(text: str | None) -> int:
    digits = (text or "0").upper().removesuffix("B")
    unit = digits[-1] if digits[-1] in "KMGT" else "M"
    return (int(digits.removesuffix(unit)) << 10 * "KMGT".index(unit)) >> 10


def _file_system(folder: Path) -> str:
    """The kind of file system that `folder` is or will be on, as the kernel calls it; empty where it does not tell."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = {
        fields[1].replace("\\040", " "): fields[2] for fields in map(str.split, lines) if len(fields) > 2
    }
    inside = [point for point in mounts if above.is_relative_to(point)]
    return mounts[max(inside, key=len)] if inside else ""


def _output(*command: str) -> str:
    answer = _run(*command)
    if answer.returncode != 0:
        raise ConfigError(f"{command[0]} does not reach the cluster: {' '.join(answer.stderr.split())}")
    return answer.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{command[0]} does not answer: {error}") from error
