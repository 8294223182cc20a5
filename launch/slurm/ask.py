"""Run Slurm's commands, each with a bounded number of tries."""

from __future__ import annotations

import os
import subprocess
import time

from ...models.errors import GraftError

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

    Raises:
        NoAnswerError: after `tries` questions to a controller that does not answer.
        NoSuchJobError: if the job has ended or never was.
        GraftError: if the command failed otherwise.
    """
    begun = time.monotonic()
    daemon = os.environ.get("SLURM_CONF", ""), words[0] == "sacct"  # slurmdbd, which may be away alone
    when, sentence = _silent.get(daemon, (-SILENCE, ""))
    if begun - when < SILENCE:
        raise NoAnswerError(sentence)
    for left in reversed(range(tries)):
        said = ""
        try:
            done = _run(words, timeout)
            if done.returncode == 0:
                return done.stdout
            said = _last_words(words[0], done)
        except subprocess.TimeoutExpired:
            said = f"no answer within {timeout:.0f} seconds"
        else:
            _raise_refusal(words[0], said)
        if left:
            time.sleep(PAUSE)
    count = f"asked {tries} times in {time.monotonic() - begun:.0f} seconds, " if tries > 1 else ""
    sentence = f"Slurm does not answer: {count}{words[0]} says: {said}"
    _silent[daemon] = time.monotonic(), sentence
    raise NoAnswerError(sentence)


def _run(words: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=_environment(),
        )
    except FileNotFoundError as error:
        raise NoAnswerError(
            f"{words[0]} is not on this machine: run this where Slurm's commands are"
        ) from error
    except OSError as error:
        raise NoAnswerError(f"{words[0]} cannot be run: {error.strerror}") from error


def _environment() -> dict[str, str]:
    """Return the environment without what a user set for squeue and sacct: it would hide jobs, or change what they
    print."""
    own = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return {**kept, "SLURM_TIME_FORMAT": "standard"}


def _last_words(program: str, done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix(f"{program}: ")  # those before it tell what led there


def _raise_refusal(program: str, said: str) -> None:
    """Raise an error that another try would not fix."""
    lower = said.lower()
    if any(word in lower for word in _GONE):
        raise NoSuchJobError(f"{program} failed: {said}")
    if not any(word in lower for word in _PASSES):
        raise GraftError(f"{program} failed: {said}")
