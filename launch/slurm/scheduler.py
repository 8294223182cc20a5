"""Ask the scheduler about jobs and nodes, and give it orders about a job.

The queue (`squeue`) is right about a job as long as it knows it, some minutes after the end of the job. After that the
accounting (`sacct`) knows it, if a site keeps one; its rows also tell how each earlier start of a requeued job ended.
It hears of a job late, and not at all while it is away.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...models.errors import GraftError
from .request import memory_of

# Run Slurm's commands, each with a bounded number of tries.

TIMEOUT = 15.0
TRIES = 3
PAUSE = 2.0
"""Seconds for one answer, questions, and seconds between two of them: 49 seconds at most until an error."""
SILENCE = 30.0
"""Seconds for which a daemon that did not answer is not asked anything else by this process."""
_PASSES = ("contact", "timed out", "connection", "zero bytes", "temporarily", "standby", "send/recv")
"""Words of a controller that is away, restarts or is too busy."""
_GONE = ("invalid job id", "already completing or completed", "already finished")


_silent: dict[tuple[str, bool], tuple[float, str]] = {}
"""Configuration of a cluster, and whether it is its accounting -> when it did not answer, and what was said of it."""


class NoAnswerError(GraftError):
    """Slurm did not answer: what it knows is not known here."""


class NoSuchJobError(GraftError):
    """Slurm has no such job (any more)."""


def ask(*words: str, timeout: float = TIMEOUT, tries: int = TRIES) -> str:
    """Return the output of a command of Slurm.

    Raises NoAnswerError after `tries` questions; NoSuchJobError: the job has ended or never was; GraftError otherwise.
    """
    begun = time.monotonic()
    daemon = os.environ.get("SLURM_CONF", ""), words[0] == "sacct"  # slurmdbd, which may be away alone
    when, sentence = _silent.get(daemon, (-SILENCE, ""))
    if begun - when < SILENCE:
        raise NoAnswerError(sentence)
    said = ""
    for left in reversed(range(tries)):
        try:
            done = _run(words, timeout)
        except subprocess.TimeoutExpired:
            said = f"no answer within {timeout:.0f} seconds"
        else:
            if done.returncode == 0:
                return done.stdout
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            said = lines[-1].removeprefix(f"{words[0]}: ")  # those before it tell what led there
            _raise_refusal(words[0], said)
        if left:
            time.sleep(PAUSE)
    count = f"asked {tries} times in {time.monotonic() - begun:.0f} seconds, " if tries > 1 else ""
    sentence = f"Slurm does not answer: {count}{words[0]} says: {said}"
    _silent[daemon] = time.monotonic(), sentence
    raise NoAnswerError(sentence)


def _run(words: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
    # without what a user set for squeue and sacct: it would hide jobs, or change what they print
    own = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**kept, "SLURM_TIME_FORMAT": "standard"},
        )
    except FileNotFoundError as error:
        said = f"{words[0]} is not on this machine: run this where Slurm's commands are"
        raise NoAnswerError(said) from error
    except OSError as error:
        raise NoAnswerError(f"{words[0]} cannot be run: {error.strerror}") from error


def _raise_refusal(program: str, said: str) -> None:
    """Raise an error that another try would not fix."""
    lower = said.lower()
    if any(word in lower for word in _GONE):
        raise NoSuchJobError(f"{program} failed: {said}")
    if not any(word in lower for word in _PASSES):
        raise GraftError(f"{program} failed: {said}")


UNKNOWN = "UNKNOWN"
REMOVED = "REMOVED"
"""Our words for a job that Slurm does not know, and for a cell of an array that it knows only the others of."""
WAITING = (
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD",
)  # fmt: skip
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
"""States of a job that waits, and of one that holds nodes; in each other one it has ended."""
_FALLEN = ("down", "fail", "error", "unknown")
_QUEUE = {
    "JobArrayID": "JobID", "State": "State", "NodeList": "NodeList", "Reason": "Reason", "RestartCnt": "Restarts",
    "exit_code": "ExitCode", "StartTime": "Start", "EndTime": "End", "Name": "JobName",
    "Command": "Command",
}  # fmt: skip
"""Columns of squeue, and what sacct calls them."""
_ACCOUNTING = ["JobID", "State", "NodeList", "ExitCode", "Start", "End", "Reason", "JobName"]
NAMELESS = "allocation"
"""What `sacct` calls a job whose name the accounting has not been told yet."""
_FLAGS = ("--states=all", "--array", "--noheader")


@dataclass(frozen=True)
class State:
    """One job, or one cell of an array, as the scheduler knows it."""

    state: str = UNKNOWN
    """Slurm's word, as in RUNNING or NODE_FAIL."""
    nodes: tuple[str, ...] = ()
    reason: str = ""
    """Why it waits, or why it ended; empty where the scheduler gives none."""
    restarts: int = 0
    start: float | None = None
    """Unix time; for a waiting job the time at which it is expected to start."""
    end: float | None = None
    """Unix time; for a running job the time at which its limit ends it."""
    exit_code: str = ""
    """`status:signal`."""
    history: tuple[str, ...] = ()
    """How earlier starts of the same job ended, if the accounting knows it."""
    name: str = ""
    script: Path | None = None
    """The name of the submission, if the queue knows it: the number alone may be another job's by now."""


def job_states(ids: Iterable[str], *, tries: int = TRIES) -> dict[str, State]:
    """Return what is known about each job; state UNKNOWN if it is not known any more. Raises GraftError.

    A cell of an array that never began, and is not known although others are, was cancelled: Slurm keeps no word of it.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    numbers = list(dict.fromkeys(job.partition("_")[0] for job in wanted))
    queued, recorded, joined = dict[str, State](), dict[str, State](), ",".join(numbers)
    with suppress(NoSuchJobError):  # said where it knows none of them, or shows none of them to this user
        words = ("squeue", f"--jobs={joined}", *_FLAGS, f"--Format={_columns(_QUEUE)}")
        queued = parse_queue(ask(*words, tries=tries))
    with suppress(GraftError):
        words = ("sacct", "--allocations", "--duplicates", "--parsable2", "-o", ",".join(_ACCOUNTING))
        recorded = parse_accounting(ask(*words, "-j", joined, tries=1))
    found = {job: _merged(queued.get(job), recorded.get(job)) for job in wanted}
    arrays = {job.partition("_")[0] for job in queued}
    lost = {job for job in wanted if found[job] == State() and "_" in job and job.partition("_")[0] in arrays}
    return {job: State(REMOVED) if job in lost else state for job, state in found.items()}


def cancel(*job_ids: str) -> None:
    """End jobs for good, in this order, whether they wait or run. Raises GraftError: one of them cannot be ended."""
    ask("scancel", *job_ids)


def signal_job(job_id: str, name: str) -> None:
    """Send a signal to every task of a running job. Raises GraftError, NoSuchJobError where it has just ended.

    Not with `--full`: that also hits the shell of the batch script, which dies of it and takes the job along.
    """
    ask("scancel", f"--signal={name}", job_id)


def reason_of_signal(job_id: str, signal_delay: int = 90) -> str:
    """Return why this job was just signalled: `preempted`, `requeued`, `cancelled`, `time limit`, or nothing.

    It is asked to save `signal_delay` seconds before its limit; the scheduler may be a minute early.
    """
    try:
        fields = job_fields(job_id, timeout=8, tries=1)
    except GraftError:
        return ""
    return reason_in(fields, int(os.environ.get("SLURM_RESTART_COUNT", "0")), datetime.now(), signal_delay)


def job_fields(job_id: str, **asking: Any) -> dict[str, str]:
    """Return the controller's record of a job. Raises GraftError."""
    text = ask("scontrol", "--oneliner", "show", "job", job_id, **asking)
    return dict(re.findall(r"(\S+?)=(\S*)", text.partition("\n")[0]))


def reason_in(fields: Mapping[str, str], restarts: int, now: datetime, signal_delay: int) -> str:
    """Return the reason that the controller's record shows for a job with `restarts` earlier starts."""
    state = fields.get("JobState", "")
    if fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"):
        return "preempted"
    if int(fields.get("Restarts", "0")) > restarts:
        return "requeued"
    if fields.get("Reason") == "TimeLimit" or state == "TIMEOUT":
        return "time limit"
    end = _time(fields.get("EndTime", ""))
    if state == "RUNNING":
        near = end is not None and end - now.timestamp() <= signal_delay + 90
        return "time limit" if near else ""
    # the batch shell may have died of its SIGTERM already
    quiet = fields.get("Reason") == "None" and fields.get("ExitCode") in ("0:0", "0:15")
    return "cancelled" if state == "CANCELLED" or (state == "COMPLETING" and quiet) else ""


def fallen_nodes(nodes: Sequence[str]) -> list[str]:
    """Return those of `nodes` that are down, failing or silent; empty if the scheduler cannot be asked."""
    if not nodes:
        return []
    try:
        text = ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T", tries=1)
    except GraftError:
        return []
    lines = [line.strip().partition(" ") for line in text.splitlines()]
    # a `*` marks one that does not answer
    gone = [name for name, _, state in lines if state.endswith("*") or state.lower().startswith(_FALLEN)]
    return list(dict.fromkeys(gone))


def number_by_name(name: str, script: Path) -> str:
    """Return the number of this user's job with this name and script; empty without one. Raises GraftError."""
    columns = _columns(("ArrayJobID", "JobID", "Command"))
    text = ask("squeue", "--me", "--states=all", "--noheader", f"--name={name}", f"--Format={columns}")
    for line in text.splitlines():
        array, number, path = (word.strip() for word in line.removesuffix("|").split("|", 2))
        if Path(path) == script:
            return array if array.isdigit() else number
    return ""


def usage_of(ids: Iterable[str]) -> list[tuple[str, float, float, float, float]]:
    """Return the job of each start, and its seconds: of its GPUs, of its cores, at work, and in the queue.

    Raises GraftError: there is no accounting, or no answer.
    """
    words = ["sacct", "--allocations", "--duplicates", "--parsable2", "--noheader"]
    columns = "--format=JobID,Submit,Start,ElapsedRaw,AllocTRES"
    found = []
    for line in ask(*words, columns, f"--jobs={','.join(ids)}").splitlines():
        job, submitted, started, elapsed, tres = line.split("|", 4)
        counts = dict(part.partition("=")[::2] for part in tres.split(","))
        gpus, cores = (int(counts.get(name) or 0) for name in ("gres/gpu", "cpu"))
        if (begin := _time(started)) is not None:  # else it has not started
            ran, waited = float(elapsed or 0), max(0.0, begin - (_time(submitted) or begin))
            found.append((job, ran * gpus, ran * cores, ran, waited))
    return found


def parse_queue(text: str) -> dict[str, State]:
    """Job id -> state, of the lines that `squeue` gives for `_QUEUE`."""
    # the last field may contain the separator
    lines = [line.removesuffix("|").split("|", len(_QUEUE) - 1) for line in text.splitlines()]
    rows = [
        dict(zip(_QUEUE.values(), map(str.strip, line), strict=True))
        for line in lines
        if len(line) == len(_QUEUE)
    ]
    return {job: _state(row) for row in rows for job in expand_id(row["JobID"])}


def parse_accounting(text: str) -> dict[str, State]:
    """Job id -> state, of what `sacct --duplicates --parsable2` gives, its header included."""
    heads, *lines = [line.split("|") for line in text.splitlines() if "|" in line] or [[]]
    found: dict[str, State] = {}
    for row in (dict(zip(heads, line, strict=False)) for line in lines):
        state = _state(row)
        for job in expand_id(row["JobID"]):
            before = found.get(job)
            again = before is not None and before.name == state.name  # else it is another job of that number
            history = (*before.history, before.state) if before is not None and again else ()
            found[job] = replace(state, history=history, restarts=len(history))
    return found


def _state(row: Mapping[str, str]) -> State:
    """Read a row of the queue or of the accounting."""

    def said(name: str) -> str:
        return _word(row.get(name, ""))

    words = said("State").split() or [UNKNOWN]  # `CANCELLED by 1000` and `CANCELLED+` are CANCELLED
    return State(
        state=words[0].rstrip("+"),
        nodes=expand_nodes(said("NodeList")),
        reason=said("Reason"),
        restarts=int(said("Restarts") or 0),
        start=_time(said("Start")),
        end=_time(said("End")),
        exit_code=_exit_code(said("ExitCode")),
        name="" if said("JobName") == NAMELESS else said("JobName"),
        script=Path(said("Command")) if said("Command") else None,
    )


def expand_id(text: str) -> list[str]:
    """Return the jobs that `123_[5-7,9%2]` means."""
    match = re.fullmatch(r"(\d+)_\[([^%\]]*)(?:%\d+)?\]", text)
    if match is None:
        return [text]
    found: list[int] = []
    for first, last, step in re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", match[2]):  # `...` ends a long list
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{match[1]}_{index}" for index in found]


@lru_cache(maxsize=256)
def expand_nodes(text: str) -> tuple[str, ...]:
    """Return the names that `gpu[01-03]` means; the packed name itself if Slurm is not here to expand it."""
    if "[" not in text:
        return tuple(name for name in text.split(",") if name)
    try:
        return tuple(ask("scontrol", "show", "hostnames", text).split())
    except GraftError:
        return (text,)


def _merged(queued: State | None, recorded: State | None) -> State:
    if queued is None:  # so it neither waits nor runs, whatever the accounting was told last
        ended = recorded is not None and recorded.state not in (*WAITING, *AT_WORK)
        return recorded if recorded is not None and ended else State()
    history = recorded.history if recorded is not None and recorded.name == queued.name else ()
    return replace(queued, history=history[-queued.restarts :] if queued.restarts else ())


def _columns(names: Iterable[str]) -> str:
    return ",".join(f"{name}:|" for name in names)


def _word(text: str) -> str:
    return "" if text in ("None", "None assigned", "N/A", "(null)") else text


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _exit_code(text: str) -> str:
    """Return `1792`, the status as wait(2) gives it, as `7:0`; after a signal there is no exit status."""
    if not text.isdigit():
        return text
    signal = int(text) & 127
    return f"0:{signal}" if signal else f"{int(text) >> 8}:0"


# Slurm's reasons for waiting, and what can be done about them.

_WAITS = {
    "Resources": "waits for nodes",
    "Priority": "waits behind jobs of higher priority",
    "DependencyNeverSatisfied": "waits for ever: the job that it follows has failed",
    "BeginTime": "waits until its begin time",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "Nodes_required_for_job_are_DOWN": "waits for nodes that are down, drained or reserved",
    "JobArrayTaskLimit": "waits for cells of its array: --array_parallelism",
    "JobHeldUser": "is held: `scontrol release` lets it go",
    "launch_failed_requeued_held": "is held, because its nodes could not start it: `scontrol release` lets it go",
    "job_requeued_in_held_state": "is held: `scontrol release` lets it go",
}
_NEVER = (
    r"\w+PerJob(Limit)?|Partition(Node|Time)Limit|PartitionConfig|BadConstraints|QOSMin\w+|\w*MaxMemPerLimit"
    r"|Invalid(Account|QOS)"
)
"""Slurm's words for a request that is beyond a limit of each job: it waits for ever."""
_FLAGS_OF = {
    r"Wall|Time": ("time",),
    r"Node|PartitionConfig": ("nodes",),
    r"GRES|Gres|Minutes": ("gpus_per_node", "time"),
    r"Cpu|CPU": ("cpus_per_task", "nodes"),
    r"Mem": ("mem",),
    r"Account": ("account",),
    r"QOS$": ("qos",),
    r"BadConstraints": ("constraint", "nodelist"),
}


def waiting(reason: str, resources: Mapping[str, Any], start: float | None = None) -> str:
    """Return why a job with these resources waits, as in `waits for nodes: Resources`: Slurm's word, with a sentence
    where there is one."""
    word = reason.partition(",")[0].strip().replace(" ", "_")  # some come with blanks
    if not word:
        return ""
    if word == "BeginTime" and start is not None:  # which is certain for it alone
        return f"waits until {clock(start)}: {word}"
    if flags := flags_beyond(reason, resources):
        return f"waits: a limit does not allow it, see {', '.join(f'--{name}' for name in flags)}: {reason}"
    return f"{_WAITS.get(word, 'waits')}: {reason}"


def flags_beyond(reason: str, resources: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the resources that are beyond a limit which each job must meet; empty where the job only waits."""
    word = reason.partition(",")[0].strip()
    if re.fullmatch(_NEVER, word) is None:
        return ()
    word = word.replace("PerNode", "")
    names = next((names for part, names in _FLAGS_OF.items() if re.search(part, word)), ("nodes", "time"))
    return (memory_of(resources),) if names == ("mem",) else names


def clock(moment: float) -> str:
    """Return a time of day, with the date if it is not today."""
    then = time.localtime(moment)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)
