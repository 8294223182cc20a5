"""What the cluster has, as Slurm's commands tell: partitions, nodes and reservations."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...models.errors import ConfigError
from .gpus import generic_in, gpus_in
from .scheduler import expand_nodes

AT_WORK = (
    "idle", "mixed", "allocated", "completing", "planned", "powered_down", "powering_down", "powering_up",
)  # fmt: skip
"""States of a node that takes jobs, or will as soon as it is free; `~` and `#` mark one that has to be woken up."""


@dataclass(frozen=True)
class Node:
    """What a machine of a partition has."""

    name: str
    cpus: int
    memory: int
    """MiB."""
    gpus: Mapping[str, int]
    """By type, "" where a node does not tell it."""
    away: str = ""
    """What keeps it from taking jobs now, as in drained; empty where nothing does."""
    generic: Mapping[str, int] = field(default_factory=dict)
    """What else it has, as in {"tmpdisk": 100}."""


def partitions() -> dict[str, dict[str, str]]:
    """Name -> fields of each partition. Raises ConfigError."""
    found = {}
    for line in output("scontrol", "--oneliner", "show", "partition").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields:
            found[fields["PartitionName"]] = fields
    return found


def reserved_nodes(own: str | None) -> set[str]:
    """Nodes that a reservation holds now, other than that in which the job runs. Raises ConfigError."""
    found: set[str] = set()
    for line in output("scontrol", "--oneliner", "show", "reservation").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("State") == "ACTIVE" and fields.get("ReservationName") != own:
            found.update(expand_nodes(fields.get("Nodes", "")))
    return found


def nodes_of(partition: str) -> list[Node]:
    """The nodes of a partition, in whatever state. Raises ConfigError."""
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
    """What a command of Slurm prints. Raises ConfigError where it fails."""
    answer = run(*command)
    if answer.returncode != 0:
        raise ConfigError(f"{command[0]} does not reach the cluster: {' '.join(answer.stderr.split())}")
    return answer.stdout


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command of Slurm, however it ends. Raises ConfigError where it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{command[0]} does not answer: {error}") from error
