"""A throw-away Slurm cluster of several nodes on this machine, from the packages slurmctld, slurmd and munge.

With `accounting`, from slurmdbd and mariadb-server as well.

    with SlurmCluster(folder, ClusterOptions(nodes=3)) as cluster:
        cluster.run("srun", "--nodes=2", "hostname")
        cluster.kill_node(cluster.nodes[0])

Its processes, and those of its jobs, are known by the path of its slurm.conf in their environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from support.hub.ports import free_ports
from support.runs.patience import PATIENCE
from support.slurm.slurm_accounting import PROGRAMS as OF_ACCOUNTING
from support.slurm.slurm_accounting import Accounting
from support.slurm.slurm_config import Addresses, ClusterOptions, write_config
from support.slurm.slurm_network import CONTROLLER, Network
from support.slurm.slurm_processes import ClusterError, children, end

PROGRAMS = ("slurmctld", "slurmd", "munged", "sinfo", "sbatch", "srun", "scancel", "scontrol", "squeue")
ADMIN_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_FOLDER = 56
"""The path of a job step's socket is up to 45 bytes longer than the cluster's folder, and may have 107."""
UP = ("idle", "mixed", "allocated", "completing")


def missing_programs(options: ClusterOptions | None = None) -> str:
    """Why there can be no cluster here: the programs that are not installed, or that it takes root; else nothing."""
    options = options or ClusterOptions()
    path = os.pathsep.join([os.environ.get("PATH", ""), ADMIN_PATH])
    own_network = options.mode == "ns"
    wanted = [*PROGRAMS, *(OF_ACCOUNTING if options.accounting else ())]
    wanted += ["ip", "nsenter", "unshare"] if own_network else []
    missing = [program for program in wanted if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    return "namespaces take root" if own_network and os.getuid() else ""


class SlurmCluster:
    """Up between `start` and `stop`, or inside `with`.

    Attributes:
        nodes: Names of the nodes.
        environment: What a process must have to speak with this cluster: `SLURM_CONF` and `PATH`.
    """

    def __init__(self, folder: Path, options: ClusterOptions | None = None) -> None:
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            raise ClusterError(
                f"{folder}: the path is longer than {LONGEST_FOLDER}, too long for Slurm's sockets"
            )
        self.folder = folder
        self.options = options or ClusterOptions()
        self.nodes = self.options.names
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", ADMIN_PATH)]),
        }
        self._mark = {"SLURM_CONF": self.environment["SLURM_CONF"]}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._network = Network(folder, self.nodes) if self.options.mode == "ns" else None
        self._accounting = Accounting(folder) if self.options.accounting else None

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Raises ClusterError, and leaves nothing running, where a daemon does not come up."""
        for name in ("log", "state", "bin"):
            (self.folder / name).mkdir(parents=True)
        try:
            self._start_munge()
            self._start_network()
            addresses = self._addresses()
            write_config(self.folder, self.options, addresses)
            self._start_database(addresses)
            self._start_controller()
            for name in self.nodes:
                self._start_slurmd(name)
            self._wait_until_up(self.nodes)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the daemons and the jobs; raises ClusterError where a process is left."""
        end(self._mark)
        for daemon in self._daemons.values():
            daemon.wait(timeout=PATIENCE)
        self._daemons.clear()
        if self._accounting is not None:  # a hundred megabytes
            shutil.rmtree(self._accounting.data, ignore_errors=True)

    def run(self, *command: str, timeout: float = PATIENCE) -> str:
        """What `command` writes to standard output, as a user of this cluster; raises ClusterError where it fails."""
        result = self._try(*command, timeout=timeout)
        if result.returncode:
            raise ClusterError(f"{' '.join(command)}: {result.returncode}: {result.stderr.strip()}")
        return result.stdout

    def sbatch(self, command: str, *flags: str) -> str:
        """Submits a job, and gives its number."""
        words = ["sbatch", "--parsable", "--output=/dev/null", *flags, "--wrap", command]
        return self.run(*words).strip()

    def kill_node(self, name: str) -> None:
        """Cuts the power of a node, and tells the controller, which else takes 15 to 30 seconds to find out."""
        end({**self._mark, "SLURMD_NODENAME": name})
        self._daemons.pop(_slurmd(name)).wait(timeout=PATIENCE)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=killed")

    def start_node(self, name: str) -> None:
        """Brings back a node that was killed."""
        self._start_slurmd(name)
        self._wait_until_up([name])

    def drain(self, *names: str) -> None:
        """Lets nothing new start on nodes, as an administrator does before maintenance."""
        self.run("scontrol", "update", f"nodename={','.join(names)}", "state=drain", "reason=maintenance")

    def undrain(self, *names: str) -> None:
        """Ends the maintenance; a controller that has just started refuses until the nodes have registered."""
        command = ["scontrol", "update", f"nodename={','.join(names)}", "state=undrain"]
        self._wait("slurmctld", lambda: self._try(*command).returncode == 0)

    def stop_controller(self) -> None:
        """Ends slurmctld; jobs go on, and no command gets an answer."""
        controller = self._daemons.pop("slurmctld")
        controller.terminate()
        controller.wait(timeout=PATIENCE)

    def start_controller(self) -> None:
        """Brings back the controller that was stopped, with what it knew."""
        self._start_controller()
        self._wait("slurmctld", lambda: self._try("scontrol", "ping").returncode == 0)

    def stop_accounting(self) -> None:
        """Ends slurmdbd: `sacct` gets no answer, and the controller keeps what is to be recorded."""
        daemon = self._daemons.pop("slurmdbd")
        daemon.terminate()
        daemon.wait(timeout=PATIENCE)

    def start_accounting(self) -> None:
        """Brings it back; the controller sends what it kept."""
        environment = self._accounts().environment
        self._start("slurmdbd", self._inside(["slurmdbd", "-D"]), **environment)
        self._wait("slurmdbd", lambda: self._try("sacct").returncode == 0)

    def cut_node(self, name: str) -> None:
        """Pulls the network cable of a node, whose tasks go on (mode `ns` only)."""
        self._cables().set_cable(name, "down")

    def _cables(self) -> Network:
        if self._network is None:
            raise ClusterError("nodes in mode 'host' have no network of their own")
        return self._network

    def _accounts(self) -> Accounting:
        if self._accounting is None:
            raise ClusterError("this cluster has no accounting")
        return self._accounting

    def _inside(self, command: Sequence[str]) -> list[str]:
        return self._network.inside(command) if self._network else list(command)

    def _addresses(self) -> Addresses:
        controller, accounting, *ports = free_ports(2 + len(self.nodes))
        own = self._network.addresses if self._network else dict.fromkeys(self.nodes, "127.0.0.1")
        at = CONTROLLER if self._network else "127.0.0.1"
        return Addresses(at, controller, own, dict(zip(self.nodes, ports, strict=True)), accounting)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(256))
        socket = self.folder / "munge.sock"
        places = [f"--key-file={key}", f"--socket={socket}", f"--pid-file={self.folder / 'munged.pid'}"]
        places += [
            f"--log-file={self.folder / 'log' / 'munged.log'}",
            f"--seed-file={self.folder / 'munge.seed'}",
        ]
        # force: the folder need not be open to other users
        self._start("munged", ["munged", "--foreground", "--force", *places])
        self._wait("munged", socket.exists)

    def _start_network(self) -> None:
        if self._network is None:
            return
        self._network.write_hosts()
        self._network.holder = self._start("bridge", self._network.bridge_command()).pid
        self._wait("bridge", self._network.ready.exists)
        self._network.write_commands(self.folder / "bin")

    def _start_database(self, addresses: Addresses) -> None:
        if self._accounting is None:
            return
        self._accounting.make_database()
        self._start("mariadbd", self._accounting.database_command())
        self._wait("mariadbd", self._accounting.database_answers)
        self._accounting.write_config(addresses)
        self.start_accounting()
        self.run("sacctmgr", "--immediate", "add", "cluster", "tests")

    def _start_controller(self) -> None:
        self._start("slurmctld", self._inside(["slurmctld", "-D"]))

    def _start_slurmd(self, name: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        command = ["slurmd", "-D", "-N", name]
        if self._network is None:
            self._start(_slurmd(name), command, SLURMD_NODENAME=name)
            return
        self._network.unplug(name)
        unshare = self._start(_slurmd(name), self._network.node_command(name, command), SLURMD_NODENAME=name)
        self._wait(_slurmd(name), lambda: bool(children(unshare.pid)))
        self._network.plug(name, children(unshare.pid)[0])

    def _start(self, daemon: str, command: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        environment = {"PATH": ADMIN_PATH, "HOME": "/", "LANG": "C.UTF-8", **self._mark, **variables}
        with (self.folder / "log" / f"{daemon}.out").open("ab") as log:
            self._daemons[daemon] = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._daemons[daemon]

    def _wait(self, daemon: str, ready: Callable[[], bool], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if self._daemons[daemon].poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"{daemon} does not come up: {self._last_lines(daemon)}")
            time.sleep(0.05)

    def _last_lines(self, daemon: str) -> str:
        files = [self.folder / "log" / f"{daemon}.{suffix}" for suffix in ("log", "out")]
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()[-3:]]
        return " | ".join(lines)

    def _wait_until_up(self, nodes: Sequence[str]) -> None:
        self._wait("slurmctld", lambda: self._try("scontrol", "ping").returncode == 0)
        for name in nodes:
            self._wait(_slurmd(name), lambda name=name: self._state(name) in UP)  # type: ignore[misc]

    def _state(self, name: str) -> str:
        return self._try("sinfo", "--noheader", f"--nodes={name}", "--format=%T").stdout.partition("\n")[0]

    def _try(self, *command: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return subprocess.run(
            command,
            env={**inherited, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def _slurmd(name: str) -> str:
    return f"slurmd.{name}"
