"""A network of namespaces for a test's Slurm cluster: one for the controller with a bridge, one for each node.

Nothing is added to the machine's own network, so any number of clusters use the same addresses at once.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from support.slurm.slurm_config import host_name
from support.slurm.slurm_processes import ClusterError

CONTROLLER = "10.99.0.1"
COMMANDS = (
    "sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol", "sinfo", "squeue", "srun",
)  # fmt: skip


class Network:
    """The commands that make the network, and that run inside it."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder = folder
        self.addresses = {name: f"10.99.0.{10 + number}" for number, name in enumerate(nodes)}
        self.holder = 0
        """The process that holds the controller's namespace open."""

    def write_hosts(self) -> None:
        known = {"127.0.0.1": "localhost", CONTROLLER: f"{socket.gethostname()} {host_name()}"}
        known |= {address: name for name, address in self.addresses.items()}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in known.items()))

    @property
    def ready(self) -> Path:
        """A file that is there once the bridge is."""
        return self.folder / "network.up"

    def bridge_command(self) -> list[str]:
        """Makes the controller's namespace and holds it open."""
        steps = [
            self._own_hosts(),
            "ip link set lo up",
            "ip link add bridge type bridge",
            f"ip addr add {CONTROLLER}/24 dev bridge",
            "ip link set bridge up",
            f"touch {shlex.quote(str(self.ready))}",
            "exec sleep infinity",
        ]
        return ["unshare", "--net", "--uts", "--mount", "sh", "-ec", "; ".join(steps)]

    def node_command(self, name: str, command: Sequence[str]) -> list[str]:
        """Runs `command` as a host of its own, which waits until `plug` has brought its cable."""
        steps = [
            f"hostname {name}",
            self._own_hosts(),
            "ip link set lo up",
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done",
            f"ip addr add {self.addresses[name]}/24 dev eth0",
            "ip link set eth0 up",
            # the shell stays, and buries the orphans of this process table
            f"{shlex.join(command)} & wait $!",
        ]
        namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["unshare", *namespaces, "sh", "-ec", "; ".join(steps)]

    def _own_hosts(self) -> str:
        return f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts"

    def inside(self, command: Sequence[str]) -> list[str]:
        """`command` in the controller's namespace."""
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", "--", *command]

    def write_commands(self, folder: Path) -> None:
        """Slurm's commands for those outside; a task on a node is inside and runs the plain ones."""
        for command in COMMANDS:
            plain = f"/usr/bin/{command}"
            enter = shlex.join(self.inside([plain]))
            path = folder / command
            path.write_text(f'#!/bin/sh\n[ -z "$SLURMD_NODENAME" ] || exec {plain} "$@"\nexec {enter} "$@"\n')
            path.chmod(0o755)

    def plug(self, name: str, pid: int) -> None:
        """Brings a cable from the bridge to the namespace of process `pid`."""
        cable = self._cable(name)
        self._ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._ip("link", "set", cable, "master", "bridge", "up")

    def unplug(self, name: str) -> None:
        """Takes the cable of a node that died away, where the kernel has not done so yet."""
        subprocess.run(
            self.inside(["ip", "link", "del", self._cable(name)]), capture_output=True, check=False
        )

    def set_cable(self, name: str, state: str) -> None:
        self._ip("link", "set", self._cable(name), state)

    def _cable(self, name: str) -> str:
        return f"to-{name}"

    def _ip(self, *words: str) -> None:
        result = subprocess.run(self.inside(["ip", *words]), capture_output=True, text=True, check=False)
        if result.returncode:
            raise ClusterError(f"ip {' '.join(words)}: {result.stderr.strip()}")
