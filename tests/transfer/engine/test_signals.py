"""Stop signals: a flag, no surprise, and the old handlers afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.early_signals import EARLY_SIGNALS, remembering
from graftvit.transfer.engine.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_read_at_the_boundary(number: int) -> None:
    with StopSignals() as signals:
        assert signals.agreed().signal is None
        os.kill(os.getpid(), number)
        assert signals.agreed().signal == number
        assert signals.agreed().signal == number


def test_a_second_interrupt_aborts_at_once() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_after_a_termination_does_not_abort_the_save() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_handlers_are_put_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    during = []

    def fail() -> None:
        during.extend(signal.getsignal(number) for number in STOP_SIGNALS)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), StopSignals():
        fail()
    assert all(new != old for new, old in zip(during, before, strict=True))
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_forked_child_neither_stops_nor_dies() -> None:
    with StopSignals():
        child = os.fork()
        if child == 0:
            for number in STOP_SIGNALS:
                os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with StopSignals() as signals:
            seen.append((signals.agreed().signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_signals_are_remembered_from_before_a_run_and_only_until_its_end() -> None:
    before = [signal.getsignal(number) for number in EARLY_SIGNALS]
    with remembering():
        os.kill(os.getpid(), signal.SIGTERM)
        with remembering():  # a job remembers already
            assert early_signals.received == [signal.SIGTERM]
        with StopSignals() as signals:
            assert signals.agreed().signal == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert early_signals.received == [signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM]
    assert [signal.getsignal(number) for number in EARLY_SIGNALS] == before
    assert early_signals.received == []


def test_a_forked_child_of_one_that_remembers_does_not() -> None:
    with remembering():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(len(early_signals.received))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


EARLY = """
import os, signal, sys
from graftvit.launch import cli
cli._run_real = cli._run
def run(words):
    assert "torch" not in sys.modules
    os.kill(os.getpid(), signal.SIGTERM)
    return cli._run_real(words)
cli._run = run
sys.exit(cli.main(["train", "--mode", "scratch", "--dataset", "digits", "--model", "vit_tiny_patch16_224",
    "--img_size", "16", "student.model_args.patch_size=8", "student.model_args.in_chans=1", "--device", "cpu",
    "--max_steps", "3", "--output_dir", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_signal_while_torch_is_loaded_ends_the_command_before_its_first_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLY, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM before its first step; the same command continues from there" in done.stderr
    assert not (tmp_path / "run" / "log.jsonl").exists()
