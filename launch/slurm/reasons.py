"""Why a job waits or could not start: Slurm's reasons in plain English, with Slurm's own word beside them."""

from __future__ import annotations

import re
import time
from pathlib import Path

WAITS = {
    "Resources": "waits for nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for ever: the job that it follows has failed",
    "BeginTime": "waits until its begin time",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "Nodes_required_for_job_are_DOWN": "waits for nodes that are down, drained or reserved",
    "NodeDown": "waits for a node that is down",
    "PartitionDown": "waits for its partition, which is down",
    "PartitionInactive": "waits for its partition, which takes no jobs now",
    "PartitionConfig": "waits for what its partition does not have",
    "PartitionNodeLimit": "waits for more nodes than its partition gives a job",
    "PartitionTimeLimit": "waits for more time than its partition gives a job",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for licenses",
    "Cleaning": "waits until its last start is cleaned up",
    "JobArrayTaskLimit": "waits for cells of its array: --array_parallelism",
    "JobHeldUser": "is held: `scontrol release` lets it go",
    "JobHeldAdmin": "is held by an administrator",
    "launch_failed_requeued_held": "is held: its nodes could not start it",
    "InvalidAccount": "waits for an account that is not valid",
    "InvalidQOS": "waits for a QOS that is not valid",
    "BadConstraints": "waits for nodes that do not exist",
}
_LIMITS = (
    (r"(QOS|Assoc)?MaxJobsPer(User|Account).*|(QOS|Assoc)MaxJobsLimit", "waits until fewer of your jobs run"),
    (r"(QOS|Assoc).*(Max|Grp)(Submit).*", "waits until fewer jobs are queued"),
    (
        r"(QOS|Assoc).*(Max|Grp).*(Wall|RunMinutes|CPUMins).*",
        "waits for the time budget of your account or QOS",
    ),
    (r"(QOS|Assoc).*", "waits for a limit of your account or QOS"),
)
_LAUNCH = "its nodes could not start it: most often they do not see {folder} or may not write there"
STARTS = {
    "JobLaunchFailure": _LAUNCH,
    "launch_failed_requeued_held": _LAUNCH,
    "RaisedSignal:53": _LAUNCH,
    "BadConstraints": "no nodes are as it asks for",
}


def waiting(reason: str, start: float | None = None) -> str:
    """Why a job waits, as in `waits for nodes: Resources`.

    Args:
        reason: Slurm's word, with what it may add after a comma.
        start: When it is expected to start; that of `BeginTime` is certain.
    """
    word = reason.partition(",")[0].strip()
    if not word:
        return ""
    if word == "BeginTime" and start is not None:
        return f"waits until {clock(start)}: {word}"
    plain = WAITS.get(word) or next(
        (text for pattern, text in _LIMITS if re.fullmatch(pattern, word)), "waits"
    )
    return f"{plain}: {reason}"


def launch_failure(reason: str, exit_code: str, folder: Path) -> str:
    """What most often kept a job from starting at all, with Slurm's word; nothing for other ends."""
    word = reason.partition("(")[0].strip() or ("RaisedSignal:53" if exit_code.endswith(":53") else "")
    text = STARTS.get(word, "")
    return f"{text.format(folder=folder)}: {reason or exit_code}" if text else ""


def clock(moment: float) -> str:
    """A time of day, with the date where it is not today."""
    then = time.localtime(moment)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
