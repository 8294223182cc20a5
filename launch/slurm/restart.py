"""Decide whether a failed job is restarted: its batch script asks, once all its tasks have ended.

    python -m graftvit.launch.slurm.restart LAUNCH CODE

A rank that the kernel kills writes nothing, and the other ranks fail with it. So a rank cannot decide this. If somebody
cancels, preempts or requeues a job, its batch script ends as well and does not run this; and the scheduler itself
restarts the job only if it still runs.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ...checkpoints.files import UnreadableError, read_json
from ...models.errors import GraftError, counted
from .failures import Failure
from .folder import Attempt, JobFolder, newest_state
from .logs import NO_MEMORY, NOTHING, said_of
from .scheduler import ask, expand_nodes

PATIENCE, PAUSE = 300.0, 10.0
"""Seconds that the record may be out of reach, and between two looks at it."""
LONGEST_WAIT = 3600
TRIES = 20
"""Questions to a controller that may be starting again."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Verdict:
    """The decision about a job that has failed."""

    attempt: str
    """The name of the files of the attempt that failed."""
    why: str
    """Empty where it did not fail, and was only not started again."""
    wait: int | None
    """Seconds until it may start again; None where it does not."""
    node: str = ""
    """The node to leave out, on which a rank failed by itself."""


def judge(
    files: JobFolder, job_id: str, restart: int, *, max_restarts: int, restart_wait: int
) -> Verdict | None:
    """Return what to do after an attempt; None if it ended well, was asked to end, or nothing is known about it."""
    of_job = [one for one in files.attempts() if one.job_id == job_id]
    now = next((one for one in of_job if one.restart == restart), None)
    if now is None or now.outcome in ("finished", "stopped") or files.asked_to_stop(job_id):
        return None
    if now.outcome == "requeued":  # and the scheduler refused that
        return Verdict(now.name, "", 0)
    failures = files.failures(now.name)
    lasting = [one for one in failures if one.kind == "cause" and not one.transient]
    if lasting:
        return Verdict(now.name, _words(lasting[0]), None)
    job, state = files.job_of(job_id), newest_state(files.output_dir)
    said = NOTHING if job is None else said_of(now, job)
    if said.why and not said.transient:
        return Verdict(now.name, said.why, None)
    if said.why.startswith(NO_MEMORY) and now.state == state:
        return Verdict(now.name, f"{said.why}, before anything new was saved: give a larger --mem", None)
    why = said.why or explain(now, failures)
    verdict = _again(now, of_job, why, state, max_restarts, restart_wait)
    return replace(verdict, node=said.node or _node_of(now, failures))


def _node_of(attempt: Attempt, failures: Sequence[Failure]) -> str:
    """Return the node of the rank that failed by an error of its own; empty where none did."""
    ranks = [one.rank for one in failures if one.kind == "cause" and one.rank is not None]
    size = max(1, attempt.world_size // max(1, len(attempt.nodes)))
    return attempt.nodes[min(ranks[0] // size, len(attempt.nodes) - 1)] if ranks and attempt.nodes else ""


def _again(
    now: Attempt, of_job: Sequence[Attempt], why: str, state: str, max_restarts: int, restart_wait: int
) -> Verdict:
    """Another attempt, if there were not too many that brought nothing."""
    in_vain = [one for one in of_job if one.retried and one.state == state and one is not now]
    count = 1 + len(in_vain) if now.state == state else 1
    if max_restarts == 0:
        return Verdict(now.name, f"{why}; it is not started again (--max_restarts 0)", None)
    if count > max_restarts:
        return Verdict(
            now.name,
            f"{why}; {counted(max_restarts, 'restart')} in a row brought no new state (--max_restarts)",
            None,
        )
    wait = min(LONGEST_WAIT, restart_wait * 2 ** (count - 1))
    return Verdict(
        now.name, f"{why}; starts again after {wait} s, restart {count} of {max_restarts} in a row", wait
    )


def explain(attempt: Attempt, failures: Sequence[Failure]) -> str:
    """Return why an attempt ended, in one line: an error of a rank, a rank that says nothing, what the others say of
    it."""
    own = [one for one in failures if one.kind == "cause"]
    if own:
        return _words(own[0])
    silent = sorted(set(range(attempt.world_size)) - {one.rank for one in failures})
    if len(silent) == 1:
        return f"rank {silent[0]} ended without a word"
    if failures:
        return f"a rank was lost: {_words(failures[0])}"
    return "it ended without a word"


def _words(failure: Failure) -> str:
    return f"rank {failure.rank}: {failure.last_words}"[:400]


def main(launch: Path, code: int) -> int:
    """Restart the job, or leave it as it is; return the exit code of the batch script."""
    job, restart = _job_id(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    try:
        files = JobFolder(_patiently(lambda: _run_folder(launch)))
        limits = _patiently(lambda: _limits(files, launch))
        verdict = _patiently(lambda: judge(files, job, restart, **limits))
        if verdict is None:
            return code
        if verdict.wait is None:
            _patiently(
                lambda: files.note(verdict.attempt, outcome="failed", why=verdict.why, ended=time.time())
            )
            _say(f"the job has failed: {verdict.why}")
            _tell(files, job, restart, verdict)
        elif _runs(job, restart):
            _start_again(files, job, restart, verdict, verdict.wait)
    except (OSError, GraftError) as error:
        _say(f"the job is not started again, because it cannot be found out whether it should be: {error}")
    return code


def _tell(files: JobFolder, job_id: str, restart: int, verdict: Verdict) -> None:
    job = files.job_of(job_id)
    if job is None or not job.resources.get("on_event"):
        return
    from .events import tell

    number = int(verdict.attempt.partition("-")[0])
    known = {"job_id": job_id, "attempt": number, "restart": restart, "nodes": [], "why": verdict.why}
    tell(files, "failure", job.resources, **known)


def _start_again(files: JobFolder, job: str, restart: int, verdict: Verdict, wait: int) -> None:
    """Record the restart, so that it counts, and only then ask. The nodes are free during the wait."""
    note = {"outcome": "requeued", "why": verdict.why, "retried": True, "ended": time.time()}
    if verdict.why:
        _patiently(lambda: files.note(verdict.attempt, **note))
        _say(verdict.why)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a restart begins with; scontrol inherits it
    try:  # `incomplete`: not one that was cancelled, or has been requeued, in this moment
        ask("scontrol", "requeue", "incomplete", job, tries=TRIES)
    except GraftError as error:
        files.note(verdict.attempt, outcome="failed", retried=False, why=f"{verdict.why}, but: {error}")
        raise
    if wait:
        ask("scontrol", "update", f"JobId={job}", f"StartTime=now+{wait}", tries=TRIES)
    if verdict.node:
        _leave_out(job, verdict.node)
    if files.asked_to_stop(job):  # since the question above
        ask("scancel", job, tries=TRIES)
        files.note(verdict.attempt, outcome="stopped", retried=False)


def _leave_out(job: str, node: str) -> None:
    """Exclude a node from the restart, where its partition has enough others at work."""
    try:
        fields = _fields(job)
        nodes = fields.get("NumNodes", "").partition("-")[0]
        excluded = [*expand_nodes(fields.get("ExcNodeList", "")), node]
        partition = fields.get("Partition", "").split(",")[0]
        text = ask(
            "sinfo", "-h", "-N", f"--partition={partition}", "--states=idle,mix,alloc,comp", "--format=%N"
        )
        if len(set(text.split()) - set(excluded)) >= int(nodes or 1):
            ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(excluded))}")
            _say(f"node {node} is left out of the restart")
    except (GraftError, ValueError) as error:
        _say(f"node {node} is not left out of the restart: {error}")


def _fields(job: str) -> dict[str, str]:
    text = ask("scontrol", "--oneliner", "show", "job", job, tries=TRIES)
    return dict(re.findall(r"(\S+?)=(\S*)", text.partition("\n")[0]))


def _runs(job: str, restart: int) -> bool:
    """Return whether the scheduler still treats this attempt as the running one."""
    fields = _fields(job)
    return fields.get("JobState") == "RUNNING" and fields.get("Restarts") == str(restart)


def _job_id() -> str:
    """`123`, or `123_4` for a cell of an array."""
    array, cell = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{cell}"


def _run_folder(launch: Path) -> Path:
    folders = read_json(launch / "runs.json", refusal=UnreadableError)
    return Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))])


def _limits(files: JobFolder, launch: Path) -> dict[str, int]:
    """Return the submission of this job."""
    mine = [one for one in files.jobs() if one.launch == str(launch)]
    resources = mine[-1].resources if mine else {}
    return {name: int(resources.get(name, 0)) for name in ("max_restarts", "restart_wait")}


def _patiently(act: Callable[[], Answer]) -> Answer:
    """Return the result of `act`; try again if the record's file system is away. Raises OSError in the end."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(PAUSE)


def _say(text: str) -> None:
    sys.stderr.write(f"graftvit: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2])))
