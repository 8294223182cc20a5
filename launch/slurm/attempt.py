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

from ...models.errors import GraftError, escaped
from ...transfer.engine import deadline, early_signals
from .environment import limit_threads
from .files import JobFolder
from .pitfalls import export_ranks, forget_old_results, keep_results, requeue
from .record import Record
from .scheduler import reason_of_signal

WAIT_FOR_THE_END = 600
"""Seconds that a task which got SIGTERM stays for the scheduler's SIGKILL, in case it has to be requeued."""
STOPPED = 128 + signal.SIGUSR2
"""The exit code of a run that was told to stop: what waits for it by `--after` must not begin."""


@dataclass(frozen=True)
class JobTask:
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
        if not self.output_dir.is_dir():
            sys.stderr.write(f"graftvit: error: {self._gone}, and the job ends\n")
            raise SystemExit(1)
        job = submitit.JobEnvironment()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        export_ranks(restart)
        limit_threads()
        record = Record(JobFolder(self.output_dir), job, restart)
        if record.asked_to_stop:  # a request that came too late for the attempt before
            record.note(outcome="stopped", ended=time.time())
            raise SystemExit(STOPPED)
        code = self._run(record)
        if code == 0 and not self.output_dir.is_dir():  # a command, which writes elsewhere
            sys.stderr.write(f"graftvit: {self._gone}; `graftvit {self.words[0]}` is through\n")
            raise SystemExit(0)
        if code == 0:
            record.note(outcome="finished", ended=time.time())
            keep_results()
            return {"output_dir": str(self.output_dir), "outcome": "finished"}
        if early_signals.received:
            deadline.clear()  # the run has saved, or has failed
            _leave(record)
        record.note(outcome="stopped" if code > 128 else "failed", ended=time.time())
        raise SystemExit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For submitit's own handler, which this one replaces at its first moment."""
        return submitit.helpers.DelayedSubmission(self)

    @property
    def _gone(self) -> str:
        return f"{self.output_dir} is not there any more: it was moved or removed"

    def _run(self, record: Record) -> int:
        from ..cli import dispatch  # the command and all that it loads

        try:
            code = dispatch(self.words)
        except GraftError as error:
            sentence = str(error)
            sys.stderr.write(f"graftvit: rank {record.rank}: error: {sentence}\n")
            if error.exit_code <= 128:
                record.fail(error, sentence)
            return error.exit_code
        except Exception as error:
            text = traceback.format_exc()
            sys.stderr.write(escaped(text))
            # what a rank says whose neighbours the scheduler has ended is not why the run stopped
            if not early_signals.received:
                record.fail(error, text)
            return 1
        if 0 < code <= 128:
            record.fail_for_good(f"`graftvit {self.words[0]}` ended with exit code {code}")
        return code


def _leave(record: Record) -> NoReturn:
    """After a save on a signal: stop, or go on in another attempt. The other ranks have nothing left to do.

    They leave with 0: a task that fails would end the step before the first rank has asked for the requeue.
    """
    if record.rank != 0:
        raise SystemExit(144 if record.cluster == "local" and not record.asked_to_stop else 0)
    if record.asked_to_stop:
        record.note(signal=_words(record), outcome="stopped", ended=time.time())
        raise SystemExit(STOPPED)
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
    if "cancelled" in reason:  # while it saved; asking for a restart would bring it back
        record.note(signal=reason, outcome="stopped", ended=time.time())
        raise SystemExit(128 + signal.SIGTERM)
    why = record.too_short() if "time limit" in reason else ""
    if why:
        record.fail_for_good(why)
        record.note(signal=reason, outcome="failed", ended=time.time())
        raise SystemExit(1)
    record.note(signal=reason, outcome="requeued", ended=time.time())
    requeue()
    raise SystemExit(0)


def _words(record: Record) -> str:
    """The signal that counts, and why it came as far as the scheduler tells."""
    numbers = early_signals.received
    number = signal.SIGUSR2 if signal.SIGUSR2 in numbers else numbers[-1]
    submission = record.folder.submission()
    delay = 90 if submission is None else int(submission.resources["signal_delay"])
    reason = reason_of_signal(record.raw_job_id, delay) if record.cluster == "slurm" else ""
    return signal.Signals(number).name + (f" ({reason})" if reason else "")
