"""Commands other than runs as jobs: each checks its words, and a signal of the scheduler ends it."""

from __future__ import annotations

import os
import signal

import pytest
from graftvit.launch import cli
from graftvit.launch.cli import COMMANDS
from graftvit.launch.submitted import SUBMITTED, Interrupted, check_words, ended_by_signals
from graftvit.models.errors import GraftError
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.early_signals import remembering


def test_each_is_a_command_that_can_check_its_words() -> None:
    for command in SUBMITTED:
        assert command in COMMANDS
        with pytest.raises(GraftError):
            check_words(command, ["--no_such_flag", "1"])


@pytest.mark.parametrize("number", early_signals.EARLY_SIGNALS)
def test_a_signal_of_the_scheduler_ends_a_command_at_once(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []

    def run(words: list[str]) -> int:
        reached.append("begun")
        try:
            os.kill(os.getpid(), number)
            reached.append("went on")
        finally:
            reached.append("cleaned up")
        return 0

    monkeypatch.setattr(cli, "_run", run)
    with remembering():
        assert cli.dispatch(["export", "a", "b"]) == 128 + number
        assert early_signals.received == [number]
        assert cli.dispatch(["export", "a", "b"]) == 128 + number, "it came before the command began"
    assert reached == ["begun", "cleaned up"]


def test_outside_of_a_job_signals_are_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_loader_process_leaves_the_end_to_its_parent() -> None:
    with remembering(), ended_by_signals():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(7)
            except Interrupted:
                os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
