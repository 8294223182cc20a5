"""Stop signals: a flag, no surprise, the old handlers afterwards, and an end in time where nothing moves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from graftvit.checkpoints.files import read_records
from graftvit.transfer.engine import deadline, early_signals
from graftvit.transfer.engine.deadline import SIGNALS as STOP_SIGNALS
from graftvit.transfer.engine.early_signals import EARLY_SIGNALS, remembering
from graftvit.transfer.engine.signals import StopSignals
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, state
from support.runs.patience import PATIENCE, until


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_read_at_the_boundary(number: int) -> None:
    with StopSignals() as signals:
        assert signals.agreed().signal is None
        os.kill(os.getpid(), number)
        assert signals.agreed().signal == number
        assert signals.agreed().signal == number


def test_a_second_interrupt_aborts_at_once_but_not_the_save_after_a_termination() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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


def test_a_hang_up_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with remembering(), StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_neither_stops_nor_dies_nor_remembers() -> None:
    for watched, numbers in ((StopSignals, STOP_SIGNALS), (remembering, EARLY_SIGNALS)):
        with watched():
            child = os.fork()
            if child == 0:
                for number in numbers:
                    os.kill(os.getpid(), number)
                os._exit(7 + len(early_signals.received))
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
    code, said = ends(EARLY, tmp_path / "run")
    assert code == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM before its first step; the same command continues from there" in said
    assert not (tmp_path / "run" / "log.jsonl").exists()


STUCK = """
import hashlib, os, signal, sys, threading, time
from graftvit.transfer.engine import deadline
from graftvit.transfer.engine.early_signals import remembering
deadline.GRACE = 0.2
deadline.SECOND = 0.2
"""
IN_A_LIBRARY = """
def send():
    time.sleep(0.2)
    for number in map(int, sys.argv[1:]):
        os.kill(os.getpid(), number)
        time.sleep(0.1)
threading.Thread(target=send, daemon=True).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which no handler of Python runs
"""
INDENTED = "".join(f"    {line}\n" for line in IN_A_LIBRARY.splitlines())
LOADING = f"{STUCK}\nwith remembering():\n    deadline.start(0.2)\n{INDENTED}"
STEPPING = f"""{STUCK}
from graftvit.transfer.engine.signals import StopSignals
with StopSignals(grace=float(1000)):
{INDENTED}"""


def ends(script: str, *words: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_process_that_is_stuck_in_a_library_ends(number: signal.Signals) -> None:
    code, said = ends(LOADING, int(number))
    assert code == 128 + number, said
    assert said == (
        f"graftvit: {number.name} came and nothing moved in the 0.2 seconds after it (engine.stop_grace): this process "
        "ends; what was saved stays\n"
    )


def test_a_second_ctrl_c_ends_at_once_what_is_stuck() -> None:
    code, said = ends(STEPPING, int(signal.SIGINT), int(signal.SIGINT))
    assert code == 128 + signal.SIGINT, said
    assert said == "graftvit: SIGINT came twice: this process ends; what was saved stays\n"


HANGING = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from support.runs.engine_runs import config
from graftvit.transfer.data.loaders import TrainLoader
from graftvit.transfer.engine.train import train

folder, epoch = Path(sys.argv[1]), TrainLoader.epoch

def stubborn(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(1000)

def hang(self, number, start=0):
    for done, batch in enumerate(epoch(self, number, start)):
        if done == 5:
            ready = multiprocessing.Event()
            worker = multiprocessing.Process(target=stubborn, args=(ready,), daemon=True)
            worker.start()
            ready.wait()
            (folder / "worker").write_text(str(worker.pid))
            os.kill(os.getpid(), signal.SIGTERM)
            os.open(folder / "pipe", os.O_RDONLY)  # waits for a writer for ever
        yield batch

TrainLoader.epoch = hang
train(config(folder / "run", engine={"stop_grace": 0.3, "save_every": 2}))
"""


@pytest.mark.slow
def test_a_loader_that_hangs_costs_no_more_than_the_steps_since_the_last_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code, said = ends(HANGING, tmp_path)
    assert code == 128 + signal.SIGTERM, said
    assert "graftvit: SIGTERM came and nothing moved in the 0.3 seconds after it (engine.stop_grace)" in said
    worker = int((tmp_path / "worker").read_text())
    assert until(lambda: not Path(f"/proc/{worker}/stat").exists(), "the worker stays")
    assert len(read_records(tmp_path / "run" / "log.jsonl")) == 1
    assert state(tmp_path / "run")
    done = train(config(tmp_path / "run", engine={"stop_grace": 0.3, "save_every": 2}))
    assert (done.finished, done.steps) == (True, 16)


@pytest.fixture
def watch() -> Iterator[deadline.Watch]:
    deadline.start(100.0)
    watch = deadline.current()
    assert watch is not None
    yield watch
    deadline.stop()
    assert deadline.current() is None


def test_the_time_counts_anew_with_each_step(watch: deadline.Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now)
    assert watch._left() is None
    deadline.moved()
    assert watch._left() is None  # nothing came
    now = 10.0
    watch._note(signal.SIGTERM)
    now = 60.0
    watch._note(signal.SIGTERM)
    assert watch._left() == 50.0
    deadline.moved()
    assert watch._left() == 100.0
    watch._note(signal.SIGINT)
    assert watch._left() == 100.0
    watch._note(signal.SIGINT)
    assert watch._left() == deadline.SECOND
    deadline.clear()
    assert watch._left() is None
    watch._note(signal.SIGCHLD)
    assert watch._left() is None


def test_a_run_says_how_long_and_a_job_how_long_at_least(watch: deadline.Watch) -> None:
    with deadline.watched(7.0):
        assert watch.grace == 7.0
    assert watch.grace == 100.0
    deadline.start(least=600.0)
    with deadline.watched(7.0):
        found = deadline.current()
        assert found is not None
        assert found.grace == 600.0


def test_a_forked_process_does_not_tell_its_parent_of_its_signals(watch: deadline.Watch) -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if deadline.current() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    signal.signal(signal.SIGTERM, before)
    assert watch._left() is None
