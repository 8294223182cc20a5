"""Stop signals: a flag, no surprise, and the old handlers afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from graftvit.transfer.engine.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_read_at_the_boundary(number: int) -> None:
    with StopSignals() as signals:
        assert signals.agreed() is None
        os.kill(os.getpid(), number)
        assert signals.agreed() == number
        assert signals.agreed() == number


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
            seen.append((signals.agreed(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
