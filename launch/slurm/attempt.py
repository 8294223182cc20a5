"""Run one attempt in each task of a job: run the command, write the record, and return the exit code for Slurm.

The run folder holds all that an attempt needs. When the node of an attempt dies, no code of ours is called: the next
attempt starts from the files, as any run does. If a record cannot be written, the training continues.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import submitit

from ...models.errors import GraftError, escaped, one_sentence
from ...transfer.engine import deadline, early_signals
from ..launcher import collect_seldom, limit_threads
from ..progress import current_stage, read_progress
from ..submitted import command_name
from .environment import LOG_START, export_ranks, forget_old_results, keep_results, requeue
from .failures import classify
from .folder import Attempt, Failure, JobFolder, newest_state
from .scheduler import fallen_nodes, reason_of_signal

WAIT_FOR_THE_END = 600
"""Seconds that a task which got SIGTERM stays for the scheduler's SIGKILL, in case it has to be requeued."""
STOPPED = 128 + signal.SIGUSR2
"""The exit code of a run that was asked to stop: jobs that wait for it by `--after` must not start."""


@dataclass(frozen=True)
class Task:
    """`graftvit WORDS` in a job; picklable, and called once in each task of each attempt."""

    words: list[str]
    output_dir: Path
    directory: Path = field(default_factory=Path.cwd)
    """The folder that the user submitted from: relative paths of the run start there."""

    def __call__(self) -> dict[str, str]:
        """Run to the end; leave by SystemExit where the run was stopped or failed."""
        early_signals.remember_signals(least=WAIT_FOR_THE_END)
        collect_seldom()
        forget_old_results()
        os.chdir(self.directory)
        if not self.output_dir.is_dir():
            sys.stderr.write(f"graftvit: error: {self._gone}, and the job ends\n")
            raise SystemExit(1)
        job = submitit.JobEnvironment()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        export_ranks(restart)
        limit_threads()
        record = Record(JobFolder(self.output_dir), job, restart)
        if record.asked_to_stop:  # a request that came too late for the previous attempt
            record.end("stopped", STOPPED)
        with record.watched():
            code = self._run(record)
        if code == 0 and not self.output_dir.is_dir():  # a command, which writes elsewhere
            sys.stderr.write(f"graftvit: {self._gone}; `graftvit {command_name(self.words)}` is through\n")
            raise SystemExit(0)
        if code and early_signals.received:
            deadline.clear()  # the run has saved, or has failed
            _leave(record)
        if code:
            record.end("stopped" if code > 128 else "failed", code)
        record.note(outcome="finished", ended=time.time())
        keep_results()
        return {"output_dir": str(self.output_dir), "outcome": "finished"}

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Replace submitit's own handler, as the first act of this one."""
        return submitit.helpers.DelayedSubmission(self)

    @property
    def _gone(self) -> str:
        return f"{self.output_dir} is not there any more: it was moved or removed"

    def _run(self, record: Record) -> int:
        from ..cli import dispatch

        try:
            code = dispatch(self.words)
        except GraftError as error:
            sentence = str(error)
            sys.stderr.write(f"graftvit: rank {record.rank}: error: {sentence}\n")
            if error.exit_code <= 128:
                record.fail(sentence, error)
            return error.exit_code
        except Exception as error:
            text = traceback.format_exc()
            sys.stderr.write(escaped(text))
            # if the scheduler has ended other ranks, the error of this rank is not the reason of the end
            if not early_signals.received:
                record.fail(text, error)
            return 1
        if 0 < code <= 128:
            record.fail(f"`graftvit {command_name(self.words)}` ended with exit code {code}")
        return code


def _leave(record: Record) -> NoReturn:
    """After a save on a signal, stop or request a restart. The other ranks have nothing left to do.

    They leave with 0: a task that fails would end the step before the first rank has asked for the requeue.
    """
    if record.rank != 0:
        raise SystemExit(144 if record.cluster == "local" and not record.asked_to_stop else 0)
    if record.asked_to_stop:
        record.end("stopped", STOPPED, signal=_words(record))
    until = time.monotonic() + WAIT_FOR_THE_END
    if signal.SIGUSR2 not in early_signals.received:
        record.note(signal=_words(record))
    while signal.SIGUSR2 not in early_signals.received:
        if time.monotonic() > until or record.cluster != "slurm":
            record.end("stopped", 128 + signal.SIGTERM)
        time.sleep(0.1)
    reason = _words(record)
    if "cancelled" in reason:  # while it saved; asking for a restart would bring it back
        record.end("stopped", 128 + signal.SIGTERM, signal=reason)
    if "time limit" in reason and (why := record.too_short()):
        record.fail(why)
        record.end("failed", 1, signal=reason)
    record.note(signal=reason, outcome="requeued", ended=time.time())
    requeue()
    raise SystemExit(0)


def _words(record: Record) -> str:
    """Return the signal that counts, with its reason if the scheduler knows it."""
    numbers = early_signals.received
    number = signal.SIGUSR2 if signal.SIGUSR2 in numbers else numbers[-1]
    delay = int(record.resources.get("signal_delay", 90))
    reason = reason_of_signal(record.raw_job_id, delay) if record.cluster == "slurm" else ""
    return signal.Signals(number).name + (f" ({reason})" if reason else "")


def _lost_steps(output_dir: Path) -> int:
    """Return the logged steps that come after the last state, which an attempt repeats."""
    from ...checkpoints.state import find_state, read_meta

    try:
        saved = read_meta(find_state(current_stage(output_dir) / "checkpoints"))["position"]["step"]
        return max(0, read_progress(output_dir).step - int(saved))
    except (GraftError, OSError, LookupError, TypeError, ValueError):
        return 0


SHORT_ATTEMPTS = 3
"""Attempts in a row that meet their time limit without a new state, after which there will be no other."""


class Record:
    """The record of one task. All of it except the failures is for the first rank."""

    def __init__(self, folder: JobFolder, job: submitit.JobEnvironment, restart: int) -> None:
        self.folder, self.rank, self.restart = folder, job.global_rank, restart
        self.job_id, self.raw_job_id, self.cluster = job.job_id, job.raw_job_id, job.cluster
        self.resources: Mapping[str, Any] = {}
        self._is_run = True
        self._warned = False
        self._earlier = folder.attempts()
        self._name = self._why = ""
        self._begun: dict[str, Any] = {}
        if self.rank == 0:
            self._begin(job)

    def _begin(self, job: submitit.JobEnvironment) -> None:
        with suppress(GraftError, OSError):
            if (submission := self.folder.job()) is not None:
                self.resources, self._is_run = submission.resources, submission.is_run
        last = self._earlier[-1] if self._earlier else None
        # a surviving rank may have written first
        lost = job.cluster == "slurm" and last is not None and last.outcome in (None, "failed")
        fallen = fallen_nodes(last.nodes) if last and lost else []
        start = os.environ.get(LOG_START, "")
        self._begun = {
            "started": time.time(),
            "job_id": self.job_id,
            "restart": self.restart,
            "nodes": list(job.hostnames),
            "world_size": job.num_tasks,
            "before": f"node failure: {', '.join(fallen)}" if fallen else "",
            "state": newest_state(self.folder.output_dir),
            "lost": _lost_steps(self.folder.output_dir) if last else 0,
            "log_start": int(start) if start.isdigit() else None,
        }
        self._name = self.folder.begin(**self._begun)
        known = {**self._identity, "why": last.why or last.signal} if last else self._identity
        # a command that takes long keeps no run from its start
        told = partial(tell, self.folder, "restart" if last else "start", self.resources, **known)
        threading.Thread(target=told, name="on_event", daemon=True).start()

    @property
    def _identity(self) -> dict[str, Any]:
        known = {name: self._begun[name] for name in ("job_id", "restart", "nodes")} if self._begun else {}
        return {**known, "attempt": int(self._name.partition("-")[0] or 0)}

    def watched(self) -> AbstractContextManager[None]:
        """Tell the command of `on_event` where the run makes no progress inside."""
        return stall_watch(self.folder, self.resources, self._identity)

    @property
    def asked_to_stop(self) -> bool:
        """Return whether `graftvit jobs stop` asked this job to end."""
        return self.folder.asked_to_stop(self.job_id)

    def note(self, **event: object) -> None:
        """Append to the attempt's file; create it again if somebody has removed it."""
        if self.rank != 0:
            return
        gone = not self.folder.attempt_path(self._name).exists()
        fields = {**self._begun, **event} if gone else event
        self._written(lambda: self.folder.note(self._name, **fields))
        self._why = str(event.get("why") or event.get("signal") or self._why)
        told = {"finished": "finish", "stopped": "stop"}
        if self.cluster != "slurm":  # whether a job of Slurm has failed for good, its batch script decides
            told["failed"] = "failure"
        if what := told.get(str(event.get("outcome"))):
            tell(self.folder, what, self.resources, **self._identity, why=self._why)

    def end(self, outcome: str, code: int, **event: object) -> NoReturn:
        """Note how the attempt ended, and leave."""
        self.note(**event, outcome=outcome, ended=time.time())
        raise SystemExit(code)

    def fail(self, text: str, error: BaseException | None = None) -> None:
        """Write down how this rank failed; without an `error`, a restart would meet the same again."""
        failure = Failure(self.rank, transient=False, text=text)
        if error is not None:
            kind, transient = classify(error, saved=self._has_saved())
            failure = replace(failure, kind=kind, transient=transient)
        self._written(lambda: self.folder.write_failure(self._files(), failure))
        self.note(why=one_sentence(failure.last_words)[:500])

    def too_short(self) -> str:
        """Return why no other attempt is worth it once this one has met its time limit; empty where it is."""
        now = newest_state(self.folder.output_dir)
        if now != self._begun.get("state"):
            return ""
        if not now:
            through = "the first step" if self._is_run else "the command was through"
            return f"the time limit ended before {through}: give a longer --time"
        earlier = [one for one in self._of_this_job() if one.name != self._name]
        count = 1 + len([one for one in earlier if one.state == now and "time limit" in one.signal])
        if count < SHORT_ATTEMPTS:
            return ""
        return (
            f"{count} attempts in a row met the time limit before they saved a new state: give a longer --time, or "
            "make the start of the run shorter; `graftvit jobs resume` resumes from the last state"
        )

    def _has_saved(self) -> bool:
        with suppress(OSError):
            began = [one.state for one in self._of_this_job() if one.name == self._files()]
            return bool(began) and newest_state(self.folder.output_dir) != began[0]
        return False

    def _of_this_job(self) -> list[Attempt]:
        return [one for one in self.folder.attempts() if one.job_id == self.job_id]

    def _files(self) -> str:
        """Return the name of the attempt's files. The first rank chooses it, normally before another rank fails."""
        if self._name:
            return self._name
        over = {one.name for one in self._earlier if one.outcome is not None}
        same = [one for one in self._of_this_job() if one.restart == self.restart and one.name not in over]
        if same:
            return same[-1].name
        number = self._earlier[-1].number + 1 if self._earlier else 1
        return f"{number:04d}-{self.job_id}.{self.restart}"

    def _written(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._warned:
                said = f"the record of this attempt is not written: {error}"
                sys.stderr.write(f"graftvit: rank {self.rank}: {said}\n")
            self._warned = True


# Tell a command of the site what happens to a run: mail, a web hook or a gauge without code of ours.
#
# The command of `on_event` in the site file gets one JSON object on its standard input:
#
#     {"event": "failure", "run": "/scratch/me/distill", "job_id": "1234", "attempt": 2, "restart": 1, "nodes": ["n1"],
#      "why": "rank 3: ValueError: ...", "step": 4100, "total_steps": 62500, "time": 1764090000.0}

TIMEOUT = 60.0
"""Seconds that the command may take."""
POLL = 20.0
"""Seconds between two looks at the progress."""


def tell(files: JobFolder, event: str, resources: Mapping[str, Any], **known: Any) -> None:
    """Run the command of `on_event`, where there is one, with what is known about the run."""
    command = resources.get("on_event")
    if not command:
        return
    progress = read_progress(files.output_dir)
    said = {
        "event": event, "run": str(files.output_dir), **known, "step": progress.step,
        "total_steps": progress.total_steps, "time": time.time(),
    }  # fmt: skip
    try:
        words, line = ["sh", "-c", command], json.dumps(said) + "\n"
        done = subprocess.run(words, input=line, text=True, capture_output=True, timeout=TIMEOUT)
        problem = f"exit code {done.returncode}: {done.stderr.strip()[-200:]}" if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        sys.stderr.write(f"graftvit: on_event ({event}): {problem}\n")


@contextmanager
def stall_watch(files: JobFolder, resources: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[None]:
    """Tell once of each time without progress inside of the block, from a thread."""
    over = threading.Event()

    def watch() -> None:
        seen, since, told = -1, time.monotonic(), False
        while not over.wait(POLL):
            step = read_progress(files.output_dir).step
            if step != seen:
                seen, since, told = step, time.monotonic(), False
            elif not told and time.monotonic() - since >= 60 * int(resources.get("event_minutes", 30)):
                told = True
                tell(files, "stall", resources, **known)

    if resources.get("on_event"):
        threading.Thread(target=watch, name="stall watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
