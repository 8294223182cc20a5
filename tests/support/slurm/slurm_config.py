"""What a test's Slurm cluster is to be like, and the files that tell Slurm so."""

from __future__ import annotations

import os
import pwd
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The cluster that a test asks for; its nodes are said to be bigger than this machine is."""

    nodes: int = 3
    mode: Literal["host", "ns"] = "host"
    """`host`: all nodes are this host. `ns`: each has its own network, host name and process table (needs root)."""
    cpus: int = 8
    gpus: int = 4
    """A node's GPUs, which can be asked for but do not exist."""
    gpu_types: tuple[str, ...] = ()
    """Of the GPUs of each node; they have none by default."""
    gres: str = ""
    """What else a node has, as in `tmpdisk:100`."""
    mail_program: str = "/bin/true"
    memory: int = 4000
    """A node's memory in MB."""
    user_signal: bool = False
    """Whether a job that is preempted gets the signal that it asked for; not so in Slurm's own default."""
    grace: int = 10
    """Seconds between the warning of a job that is preempted and its end."""
    accounting: bool = False
    """Whether there is a database of all jobs, with slurmdbd and `sacct`."""
    min_job_age: int = 3600
    """Seconds for which `squeue` knows a job that has ended."""

    @property
    def names(self) -> list[str]:
        """Names of the nodes; addresses in mode `host`, as a job takes its first node's name for a host to reach."""
        pattern = "n{}" if self.mode == "ns" else "127.0.0.1{}"
        return [pattern.format(number) for number in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Addresses:
    """Where the daemons listen."""

    controller: str
    controller_port: int
    nodes: Mapping[str, str]
    ports: Mapping[str, int]
    accounting_port: int


def write_config(folder: Path, options: ClusterOptions, addresses: Addresses) -> None:
    """Writes slurm.conf and the files that Slurm looks for beside it."""
    (folder / "slurm.conf").write_text("\n".join([*_lines(folder, options, addresses), ""]))
    for number in range(options.gpus):
        # must be a character device, or it is not counted
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *_generic(folder, options), ""]))
    # 22.05 must have a plug-in, which does nothing when no other plug-in asks for cgroups
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "plugstack.conf").write_text("")


def _lines(folder: Path, options: ClusterOptions, addresses: Addresses) -> Sequence[str]:
    user = pwd.getpwuid(os.getuid()).pw_name
    return [
        "ClusterName=tests",
        # ids that no other cluster gives: submitit takes a file of an earlier job with the same id for the job's, and
        # two jobs of one id on this host would meet at one port
        f"FirstJobId={random.SystemRandom().randrange(1000, 60_000_000)}",
        f"SlurmctldHost={host_name()}({addresses.controller})",
        f"SlurmctldPort={addresses.controller_port}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # a job that is requeued waits until its credential has expired: five seconds are the least
        f"AuthInfo=socket={folder}/munge.sock,cred_expire=5",
        *_loopback_only(options),
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        f"PlugStackConfig={folder}/plugstack.conf",
        f"MailProg={options.mail_program}",
        *_PLUGINS,
        *_accounting(folder, options, addresses),
        f"MinJobAge={options.min_job_age}",
        *_TIMES,
        *_FAILURES,
        *(["SlurmctldParameters=preempt_send_user_signal"] if options.user_signal else []),
        *(_node(name, options, addresses) for name in addresses.nodes),
        *_partitions(options),
    ]


_PLUGINS = [
    "ProctrackType=proctrack/linuxproc",
    "TaskPlugin=task/none",
    "JobAcctGatherType=jobacct_gather/none",
    "JobCompType=jobcomp/none",
    "MpiDefault=none",
    "SwitchType=switch/none",
    "PropagateResourceLimits=NONE",
    # the nodes may be bigger than this machine
    "SlurmdParameters=config_overrides",
    "SelectType=select/cons_tres",
    "SelectTypeParameters=CR_Core_Memory",
    "DefMemPerCPU=100",
    "GresTypes=gpu,tmpdisk",
]
_TIMES = [
    "SchedulerType=sched/backfill",
    "SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,bf_continue",
    "KillWait=5",
    "CompleteWait=0",
    "MessageTimeout=10",
    "SlurmctldTimeout=30",
    "SlurmdTimeout=10",
    "BatchStartTimeout=10",
    "UnkillableStepTimeout=20",
    "InactiveLimit=0",
    "OverTimeLimit=0",
]
_FAILURES = ["ReturnToService=2", "JobRequeue=1", "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"]


def _accounting(folder: Path, options: ClusterOptions, addresses: Addresses) -> list[str]:
    if not options.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={addresses.controller}",
        f"AccountingStoragePort={addresses.accounting_port}",
        # not a password: the socket of the munge that both speak through
        f"AccountingStoragePass={folder}/munge.sock",
    ]


def _node(name: str, options: ClusterOptions, addresses: Addresses) -> str:
    host = name if options.mode == "ns" else host_name()
    return (
        f"NodeName={name} NodeHostname={host} NodeAddr={addresses.nodes[name]} Port={addresses.ports[name]} "
        f"CPUs={options.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={options.cpus} ThreadsPerCore=1 "
        f"RealMemory={options.memory}" + (f" Gres={gres}" if (gres := _gres(name, options)) else "")
    )


def _gres(name: str, options: ClusterOptions) -> str:
    kind = f"{options.gpu_types[options.names.index(name)]}:" if options.gpu_types else ""
    gpus = f"gpu:{kind}{options.gpus}" if options.gpus else ""
    return ",".join(filter(None, [gpus, options.gres]))


def _generic(folder: Path, options: ClusterOptions) -> list[str]:
    """The lines of gres.conf, which are the same for all nodes where they have the same."""
    lines = []
    files = f"Name=gpu File={folder}/gpu[0-{options.gpus - 1}]"
    if options.gpus and options.gpu_types:
        pairs = zip(options.names, options.gpu_types, strict=True)
        lines += [f"NodeName={name} {files} Type={kind}" for name, kind in pairs]
    elif options.gpus:
        lines.append(files)
    if options.gres:
        name, _, count = options.gres.partition(":")
        lines.append(f"Name={name} Count={count}")
    return lines


def _partitions(options: ClusterOptions) -> list[str]:
    same = "Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP"
    return [
        f"PartitionName=main {same} Default=YES PriorityTier=10 PreemptMode=REQUEUE GraceTime={options.grace}",
        f"PartitionName=high {same} Default=NO PriorityTier=20 PreemptMode=OFF",
    ]


def _loopback_only(options: ClusterOptions) -> list[str]:
    """Keeps the daemons off the network, where the host's name means loopback: that is what they then listen on."""
    try:
        loopback = socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        loopback = False
    words = ["CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"]
    return words if loopback and options.mode == "host" else []


def host_name() -> str:
    return socket.gethostname().partition(".")[0]
