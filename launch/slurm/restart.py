"""Decide whether a failed job is restarted: its batch script asks, once all its tasks have ended.

    python -m graftvit.launch.slurm.restart LAUNCH CODE

A rank that the kernel kills writes nothing, and the other ranks fail with it. So a rank cannot decide this. If somebody
cancels, preempts or requeues a job, its batch script ends as well and does not run this; and the scheduler itself
restarts the job only if it still runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ...checkpoints.files import UnreadableError, read_json
from ...models.errors import GraftError, counted
from .failures import NO_MEMORY, said_of
from .folder import Attempt, Failure, Job, JobFolder, newest_state
from .request import memory_of
from .scheduler import ask, expand_nodes, job_fields

PATIENCE, PAUSE = 300.0, 10.0
"""Seconds that the record may be out of reach, and between two looks at it."""
LONGEST_WAIT = 3600
TRIES = 20
"""Questions to a controller that may be starting again."""
Answer = TypeVar("Answer")


def judge(files: JobFolder, job: Job, now: Attempt) -> Failure | None:
    """Return why an attempt failed, and in `wait` when it may start again; None if it did not fail, or has to end."""
    if now.outcome in ("finished", "stopped") or files.asked_to_stop(job.job_id):
        return None
    if now.outcome == "requeued":  # and the scheduler refused that
        return Failure(wait=0)
    failures = files.failures(now.name)
    lasting = [one for one in failures if one.kind == "cause" and not one.transient]
    if lasting:
        return replace(lasting[0], why=_words(lasting[0]))
    state, said = newest_state(files.output_dir), said_of(now, job)
    if said.why and not said.transient:
        return said
    if said.why.startswith(NO_MEMORY) and now.state == state:
        flag = memory_of(job.resources)
        return replace(said, why=f"{said.why}, before anything new was saved: give a larger --{flag}")
    why, wait = _again(files, job, now, state)
    node = said.node or _node_of(now, failures)
    return Failure(why=f"{said.why or explain(now, failures)}; {why}", wait=wait, node=node)


def _node_of(attempt: Attempt, failures: Sequence[Failure]) -> str:
    """Return the node of the rank that failed by an error of its own; empty where none did."""
    ranks = [one.rank for one in failures if one.kind == "cause" and one.rank is not None]
    size = max(1, attempt.world_size // max(1, len(attempt.nodes)))
    return attempt.nodes[min(ranks[0] // size, len(attempt.nodes) - 1)] if ranks and attempt.nodes else ""


def _again(files: JobFolder, job: Job, now: Attempt, state: str) -> tuple[str, int | None]:
    """Return whether there is another attempt, in words, and when; there is if not too many brought nothing."""
    limit, first = (int(job.resources.get(name, 0)) for name in ("max_restarts", "restart_wait"))
    own = [one for one in files.attempts() if one.job_id == job.job_id and one.name != now.name]
    in_vain = [one for one in own if one.retried and one.state == now.state == state]
    count = 1 + len(in_vain)
    if limit == 0:
        return "it is not started again (--max_restarts 0)", None
    if count > limit:
        return f"{counted(limit, 'restart')} in a row brought no new state (--max_restarts)", None
    wait = min(LONGEST_WAIT, first * 2 ** (count - 1))
    return f"starts again after {wait} s, restart {count} of {limit} in a row", wait


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
    try:
        files = JobFolder(_patiently(lambda: _run_folder(launch)))
        found = _patiently(lambda: _decided(files, launch))
        if found is None:
            return code
        job, now, verdict = found
        if verdict.wait is not None:
            _start_again(files, job, now, verdict)
        else:
            _patiently(lambda: files.note(now.name, outcome="failed", why=verdict.why, ended=time.time()))
            _say(f"the job has failed: {verdict.why}")
            _tell(files, job, now, verdict.why)
    except (OSError, GraftError) as error:
        _say(f"the job is not started again, because it cannot be found out whether it should be: {error}")
    return code


def _decided(files: JobFolder, launch: Path) -> tuple[Job, Attempt, Failure] | None:
    """Return this job, its present attempt, and what to do; None where nothing is, or one of them has no record."""
    array, cell = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    number = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{cell}"
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    jobs = [replace(one, job_id=number) for one in files.jobs() if one.launch == str(launch)]
    own = [one for one in files.attempts() if (one.job_id, one.restart) == (number, restart)]
    verdict = judge(files, jobs[-1], own[0]) if jobs and own else None
    return None if verdict is None else (jobs[-1], own[0], verdict)


def _tell(files: JobFolder, job: Job, now: Attempt, why: str) -> None:
    if job.resources.get("on_event"):
        from .attempt import tell

        known = {"job_id": job.job_id, "attempt": now.number, "restart": now.restart, "nodes": now.nodes}
        tell(files, "failure", job.resources, **known, why=why)


def _start_again(files: JobFolder, job: Job, now: Attempt, verdict: Failure) -> None:
    """Record the restart, so that it counts, and only then ask. The nodes are free during the wait."""
    fields, number = job_fields(job.job_id, tries=TRIES), job.job_id
    if fields.get("JobState") != "RUNNING" or fields.get("Restarts") != str(now.restart):
        return  # the scheduler has ended it, or runs it again
    note = {"outcome": "requeued", "why": verdict.why, "retried": True, "ended": time.time()}
    if verdict.why:
        _patiently(lambda: files.note(now.name, **note))
        _say(verdict.why)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a restart begins with; scontrol inherits it
    try:  # `incomplete`: not one that was cancelled, or has been requeued, in this moment
        ask("scontrol", "requeue", "incomplete", number, tries=TRIES)
    except GraftError as error:
        files.note(now.name, outcome="failed", retried=False, why=f"{verdict.why}, but: {error}")
        raise
    if verdict.wait:
        ask("scontrol", "update", f"JobId={number}", f"StartTime=now+{verdict.wait}", tries=TRIES)
    if verdict.node:
        _leave_out(number, verdict.node)
    if files.asked_to_stop(number):  # since the question above
        ask("scancel", number, tries=TRIES)
        files.note(now.name, outcome="stopped", retried=False)


def _leave_out(job: str, node: str) -> None:
    """Exclude a node from the restart, where its partition has enough others at work."""
    try:
        fields = job_fields(job, tries=TRIES)
        nodes = int(fields.get("NumNodes", "").partition("-")[0] or 1)
        excluded = dict.fromkeys([*expand_nodes(fields.get("ExcNodeList", "").replace("(null)", "")), node])
        partition = f"--partition={fields.get('Partition', '').split(',')[0]}"
        text = ask("sinfo", "-h", "-N", partition, "--states=idle,mix,alloc,comp", "--format=%N")
        if len(set(text.split()) - set(excluded)) >= nodes:
            ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(excluded)}")
            _say(f"node {node} is left out of the restart")
    except (GraftError, ValueError) as error:
        _say(f"node {node} is not left out of the restart: {error}")


def _run_folder(launch: Path) -> Path:
    folders = read_json(launch / "runs.json", refusal=UnreadableError)
    return Path(folders[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))])


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
