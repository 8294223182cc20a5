"""What runs in each task of a job: the ordinary command, and how its end is told to the scheduler.

Everything that an attempt needs to know stands in the run folder. When the node of an attempt dies, nobody calls
anything: the next one starts from the files, as any run does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import submitit

from ...models.errors import GraftError, escaped, one_sentence
from ...transfer.engine import deadline, early_signals
from .environment import limit_threads
from .files import JobFolder
from .pitfalls import export_ranks, forget_old_results, requeue

WAIT_FOR_THE_END = 600
"""Seconds that a task which got SIGTERM stays for the scheduler's SIGKILL, in case it has to be requeued."""


@dataclass(frozen=True)
class Attempt:
    """`graftvit WORDS` in a job; picklable, and called once in each task of each attempt."""

    words: list[str]
    output_dir: Path
    directory: Path
    """Where the user submitted from: relative paths of the run are meant from there."""

    def __call__(self) -> dict[str, str]:
        """Runs to the end; leaves by SystemExit where the run was stopped or failed."""
        early_signals.remember_signals(least=WAIT_FOR_THE_END)
        forget_old_results()
        os.chdir(self.directory)
        job = submitit.JobEnvironment()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        export_ranks(restart)
        limit_threads()
        record = _Record(JobFolder(self.output_dir), job, restart)
        code = self._run(record)
        if code == 0:
            record.note(outcome="finished", ended=time.time())
            return {"output_dir": str(self.output_dir), "outcome": "finished"}
        if early_signals.received:
            deadline.clear()  # the run has saved, or has failed
            _leave(record)
        record.note(outcome="stopped" if code > 128 else "failed", ended=time.time())
        raise SystemExit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For submitit's own handler, which this one replaces at its first moment."""
        return submitit.helpers.DelayedSubmission(self)

    def _run(self, record: _Record) -> int:
        from ..cli import dispatch  # the command and all that it loads

        try:
            return dispatch(self.words)
        except GraftError as error:
            sentence = str(error)
            sys.stderr.write(f"graftvit: rank {record.rank}: error: {sentence}\n")
            if error.exit_code <= 128:
                record.fail(sentence)
            return error.exit_code
        except Exception:
            text = traceback.format_exc()
            sys.stderr.write(escaped(text))
            # what a rank says whose neighbours the scheduler has ended is not why the run stopped
            if not early_signals.received:
                record.fail(text)
            return 1


class _Record:
    """What this task writes down of the attempt; all but the errors is for the first rank."""

    def __init__(self, folder: JobFolder, job: submitit.JobEnvironment, restart: int) -> None:
        from .scheduler import fallen_nodes

        self.folder, self.rank, self.job_id = folder, job.global_rank, job.raw_job_id
        self.cluster = job.cluster
        self.started = time.time()
        earlier = folder.attempts()
        self.number = earlier[-1].number + 1 if earlier else 1
        if self.rank != 0:
            last = earlier[-1] if earlier else None
            if (
                last is not None
                and last.outcome is None
                and (last.job_id, last.restart) == (job.job_id, restart)
            ):
                self.number = last.number  # the first rank was quicker
            return
        before = ""
        if earlier and earlier[-1].outcome is None:
            fallen = fallen_nodes(earlier[-1].nodes) if job.cluster == "slurm" else []
            before = f"node failure: {', '.join(fallen)}" if fallen else ""
        self.number = folder.begin(
            job_id=job.job_id,
            restart=restart,
            nodes=list(job.hostnames),
            world_size=job.num_tasks,
            before=before,
        )

    def note(self, **event: object) -> None:
        if self.rank == 0:
            self.folder.note(self.number, **event)

    def fail(self, text: str) -> None:
        self.folder.write_error(self.number, self.rank, text)
        self.note(why=one_sentence(text.strip().splitlines()[-1])[:500])


def _leave(record: _Record) -> NoReturn:
    """After a save on a signal: stop, or go on in another attempt. The other ranks have nothing left to do.

    They leave with 0: a task that fails would end the step before the first rank has asked for the requeue.
    """
    if record.rank != 0:
        raise SystemExit(144 if record.cluster == "local" and not record.folder.stop_path.exists() else 0)
    if record.folder.stop_path.exists():
        record.note(signal=_words(record), outcome="stopped", ended=time.time())
        raise SystemExit(128 + signal.SIGUSR2)  # what waits for this run by `--after` must not begin
    until = time.monotonic() + WAIT_FOR_THE_END
    told = False
    while signal.SIGUSR2 not in early_signals.received:
        if not told:
            record.note(signal=_words(record))
            told = True
        if time.monotonic() > until or record.cluster != "slurm":
            record.note(outcome="stopped", ended=time.time())
            raise SystemExit(128 + signal.SIGTERM)
        time.sleep(0.1)
    reason = _words(record)
    if "time limit" in reason and not _saved_since(record):
        why = "the time limit ended before the first step: give a longer --time"
        record.fail(why)
        record.note(signal=reason, outcome="failed", ended=time.time())
        raise SystemExit(1)
    record.note(signal=reason, outcome="requeued", ended=time.time())
    requeue()
    raise SystemExit(0)


def _words(record: _Record) -> str:
    """The signal that counts, and why it came as far as the scheduler tells."""
    from .scheduler import reason_of_signal

    numbers = early_signals.received
    number = signal.SIGUSR2 if signal.SIGUSR2 in numbers else numbers[-1]
    submission = record.folder.submission()
    delay = 90 if submission is None else int(submission.resources["signal_delay"])
    reason = reason_of_signal(record.job_id, delay) if record.cluster == "slurm" else ""
    return signal.Signals(number).name + (f" ({reason})" if reason else "")


def _saved_since(record: _Record) -> bool:
    """Whether this attempt has saved a state, of whatever stage or cell."""
    states = record.folder.output_dir.rglob("last.safetensors")
    return any(path.stat().st_mtime >= record.started for path in states)
