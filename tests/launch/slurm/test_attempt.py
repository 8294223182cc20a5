"""What one task of a job does at its start and at each kind of end, with a scheduler that is only pretended."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints import state
from graftvit.launch import cli
from graftvit.launch.slurm import attempt as module
from graftvit.launch.slurm.attempt import Task
from graftvit.launch.slurm.folder import Attempt as Record
from graftvit.launch.slurm.folder import Failure, JobFolder, read_failure
from graftvit.models.errors import ConfigError, RunFailedError
from graftvit.transfer.engine import early_signals
from support.slurm.slurm_folders import be_a_task, failing


class Job:
    """A task of job 77: what it runs, what the scheduler says, how it ends."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        self.reason, self.requeued = "preempted", 0
        patch.setattr(module, "reason_of_signal", lambda *_: self.reason)
        patch.setattr(module, "fallen_nodes", lambda _: [])
        patch.setattr(module, "requeue", self._requeue)
        patch.setattr(module, "limit_threads", lambda: None)

    def _requeue(self) -> None:
        self.requeued += 1

    def run(self, work: Callable[[], int], rank: int = 0, restart: int = 0) -> Any:
        """The result, or the code that the process leaves with."""
        launch = self.folder / "jobs" / "launch-0"
        be_a_task(self._patch, launch, PROCID=rank, LOCALID=rank % 2, RESTART_COUNT=restart)
        self._patch.setattr(cli, "dispatch", lambda words: work())
        try:
            return Task(["train", "x.yaml"], self.folder, self.folder)()
        except SystemExit as leaving:
            return leaving.code

    @property
    def last(self) -> Record:
        return JobFolder(self.folder).attempts()[-1]

    @property
    def failures(self) -> list[Failure]:
        folder = self.folder / "jobs" / "errors"
        return [read_failure(path) for path in folder.glob("*")]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    before = {number: signal.getsignal(number) for number in early_signals.EARLY_SIGNALS}
    held = Path.cwd(), dict(os.environ)
    yield Job(tmp_path, monkeypatch)
    os.chdir(held[0])
    os.environ.clear()
    os.environ.update(held[1])
    for number, handler in before.items():
        signal.signal(number, handler)
    early_signals.forget_signals()


def stopped_by(*numbers: int, meanwhile: Callable[[], object] = lambda: None) -> Callable[[], int]:
    """A run that gets signals, saves, and says which one stopped it."""

    def work() -> int:
        meanwhile()
        for number in numbers:
            os.kill(os.getpid(), number)
        return 128 + numbers[-1]

    return work


def test_a_finished_run_is_a_result_although_a_signal_came(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.run(lambda: 0) == {"output_dir": str(job.folder), "outcome": "finished"}
    assert (job.last.outcome, job.last.nodes, job.last.world_size) == ("finished", ["node1", "node2"], 4)
    assert job.last.ended is not None
    assert job.last.log_start is None
    monkeypatch.setenv("GRAFTVIT_LOG_START", "21")  # where its part of the log begins
    assert job.run(lambda: os.kill(os.getpid(), signal.SIGUSR2) or 0, restart=1)["outcome"] == "finished"
    assert (job.last.log_start, job.requeued) == (21, 0)


def neighbor_ended() -> int:
    os.kill(os.getpid(), signal.SIGUSR2)
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("work", "reason", "code", "outcome", "said"),
    [
        (stopped_by(signal.SIGUSR2), "preempted", 0, "requeued", "SIGUSR2 (preempted)"),
        (neighbor_ended, "preempted", 0, "requeued", "SIGUSR2 (preempted)"),
        (stopped_by(signal.SIGUSR2, signal.SIGTERM), "cancelled", 143, "stopped", "SIGUSR2 (cancelled)"),
        (stopped_by(signal.SIGTERM), "cancelled", 143, "stopped", "SIGTERM (cancelled)"),
        (lambda: 130, "", 130, "stopped", ""),
        (lambda: 2, "", 2, "failed", ""),
    ],
    ids=["preempted", "neighbor ended", "cancelled while it saves", "cancelled", "Ctrl-C", "code"],
)
def test_the_end_of_a_run(
    job: Job, work: Callable[[], int], reason: str, code: int, outcome: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The first rank asks for the requeue, and the others leave in peace."""
    monkeypatch.setattr(module, "WAIT_FOR_THE_END", 0.05)  # nothing else comes
    job.reason = reason
    assert job.run(work) == code
    assert (job.requeued, job.last.outcome, job.last.signal) == (outcome == "requeued", outcome, said)
    lasting = [("cause", False)] if outcome == "failed" else []
    assert [(failure.kind, failure.transient) for failure in job.failures] == lasting
    if outcome == "requeued":
        assert (job.run(work, rank=3), job.requeued) == (0, 1)


def test_a_termination_waits_for_what_else_may_come(job: Job) -> None:
    def later() -> None:
        while not JobFolder(job.folder).attempts()[-1].signal:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=later)

    def work() -> int:
        thread.start()
        return stopped_by(signal.SIGTERM)()

    assert job.run(work) == 0
    thread.join()
    assert (job.requeued, job.last.outcome) == (1, "requeued")


def test_a_request_to_stop_is_not_requeued_and_not_too_late_for_the_next_attempt(job: Job) -> None:
    folder = JobFolder(job.folder)
    folder.folder.mkdir()
    folder.stop_request("76").touch()  # to another job of the folder
    assert job.run(stopped_by(signal.SIGUSR2)) == 0
    assert (job.requeued, job.last.outcome) == (1, "requeued")
    stop = folder.stop_request("77").touch
    assert job.run(stopped_by(signal.SIGUSR2, meanwhile=stop), restart=1) == 140
    assert (job.requeued, job.last.outcome) == (1, "stopped")
    begun: list[bool] = []
    assert job.run(lambda: int(begun.append(True) or 0), restart=2) == 140
    assert (begun, job.requeued, job.last.outcome) == ([], 1, "stopped")


def test_a_limit_that_ends_before_the_first_save_is_not_requeued_for_ever(job: Job) -> None:
    job.reason = "time limit"
    assert job.run(stopped_by(signal.SIGUSR2)) == 1
    assert (job.requeued, job.last.outcome) == (0, "failed")
    assert "longer --time" in job.last.why
    (failure,) = job.failures
    assert (failure.kind, failure.transient) == ("cause", False)
    assert job.run(stopped_by(signal.SIGUSR2, meanwhile=lambda: save(job.folder)), restart=1) == 0
    assert (job.requeued, job.last.outcome) == (1, "requeued")
    assert job.run(stopped_by(signal.SIGUSR2), restart=2) == 0  # before a step: the run has come further
    assert (job.requeued, job.last.outcome) == (2, "requeued")


def save(folder: Path) -> None:
    last = folder / "checkpoints" / "last.safetensors"
    last.parent.mkdir(exist_ok=True)
    last.write_bytes(b"")


@pytest.mark.parametrize(("reasons", "left"), [("ttt", [0, 0, 1]), ("pppttt", [0, 0, 0, 0, 0, 1])])
def test_attempts_that_are_all_too_short_end_the_run(job: Job, reasons: str, left: list[int]) -> None:
    """Preemptions before them do not count."""
    save(job.folder)
    for restart, (reason, code) in enumerate(zip(reasons, left, strict=True)):
        job.reason = {"t": "time limit", "p": "preempted"}[reason]
        assert job.run(stopped_by(signal.SIGUSR2), restart=restart) == code
    assert (job.requeued, job.last.outcome) == (len(left) - 1, "failed")
    assert job.last.why.startswith("3 attempts in a row met the time limit before they saved a new state")


def test_a_record_that_is_removed_meanwhile_is_made_anew_and_is_not_that_of_the_next_job(job: Job) -> None:
    assert job.run(lambda: shutil.rmtree(job.folder / "jobs") or 0)["outcome"] == "finished"
    assert (job.last.outcome, job.last.nodes, job.last.restart) == ("finished", ["node1", "node2"], 0)
    folder = JobFolder(job.folder)

    def work() -> int:
        shutil.rmtree(job.folder / "jobs")
        folder.begin(job_id="78", restart=0, nodes=["b1"], world_size=4, before="")
        raise ValueError("boom")

    job.run(work)
    mine, other = sorted(folder.attempts(), key=lambda one: one.job_id)
    assert (mine.job_id, mine.outcome, other.job_id, other.outcome) == ("77", "failed", "78", None)
    assert folder.failures(other.name) == []
    assert "boom" in folder.failures(mine.name)[0].text


def test_a_record_that_cannot_be_written_stops_no_training(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        for name in ("note", "write_failure"):
            monkeypatch.setattr(JobFolder, name, failing(OSError(116, "Stale file handle")))
        raise ValueError("boom")

    assert job.run(work) == 1
    assert capsys.readouterr().err.count("the record of this attempt is not written") == 1


@pytest.mark.parametrize(
    ("error", "rank", "saves", "code", "kind", "transient", "words"),
    [
        (RuntimeError("Connection closed by peer"), 2, False, 1, "consequence", True, "closed by peer"),
        (MemoryError("full"), 0, True, 1, "cause", True, "MemoryError: full"),  # it was enough for a state
        (MemoryError("full"), 0, False, 1, "cause", False, "MemoryError: full"),
        (ConfigError("optim.blr is\n wrong"), 2, False, 2, "cause", False, "optim.blr is wrong"),
        (RunFailedError("the disk is full"), 0, False, 1, "cause", False, "the disk is full"),
        (ZeroDivisionError("by zero"), 0, False, 1, "cause", False, "ZeroDivisionError: by zero"),
    ],
)
def test_a_failure_is_judged_and_written_down_by_its_rank(
    job: Job, error: Exception, rank: int, saves: bool, code: int, kind: str, transient: bool, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def work() -> int:
        if saves:
            save(job.folder)
        raise error

    assert job.run(work, rank=rank) == code
    (failure,) = job.failures
    assert (failure.rank, failure.kind, failure.transient) == (rank, kind, transient)
    assert words in failure.text
    assert words in capsys.readouterr().err
    if rank == 0:
        assert (job.last.outcome, job.last.why) == ("failed", words)


def test_steps_that_are_done_again_are_counted(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.folder / "log.jsonl").write_text('{"epoch": 0, "step": 30}\n')
    lost = []
    for restart in range(3):
        job.run(stopped_by(signal.SIGUSR2), restart=restart)
        lost.append(job.last.lost)
        monkeypatch.setattr(state, "read_meta", lambda path: {"position": {"step": 10 * job.requeued}})
    assert lost == [0, 20, 10]


def test_a_job_whose_run_folder_is_gone_ends_with_a_sentence(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = job.folder / "gone"

    def attempt() -> object:
        with pytest.raises(SystemExit) as leaving:
            Task(["evaluate", "x"], gone, job.folder)()
        return leaving.value.code

    def dispatch(words: list[str]) -> int:
        shutil.rmtree(gone)
        return 0

    assert job.run(lambda: 0) == {"output_dir": str(job.folder), "outcome": "finished"}
    assert attempt() == 1
    sentence = f"{gone} is not there any more: it was moved or removed"
    assert capsys.readouterr().err == f"graftvit: error: {sentence}, and the job ends\n"
    gone.mkdir()
    monkeypatch.setattr(cli, "dispatch", dispatch)
    assert attempt() == 0  # a command that has written its result elsewhere
    assert capsys.readouterr().err == f"graftvit: {sentence}; `graftvit evaluate` is through\n"
    assert not gone.exists()
