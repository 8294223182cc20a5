"""Which failed attempt is followed by another one, with records that are written by hand and a pretended Slurm."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import restart as module
from graftvit.launch.slurm import scheduler
from graftvit.launch.slurm.attempt import Task
from graftvit.launch.slurm.batch import Batch, script
from graftvit.launch.slurm.folder import Failure, JobFolder, Kind
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.restart import judge, main
from support.slurm.slurm_folders import SILENT, failing, submitted

LOST: tuple[Kind, bool, str] = ("consequence", True, "RuntimeError: Connection closed by peer")
STALE: tuple[Kind, bool, str] = ("cause", True, "OSError: [Errno 116] Stale file handle")


class Run:
    """A run folder of job 77, four ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.restart = folder, JobFolder(folder), -1

    def attempt(self, *failures: tuple[Kind, bool, str], **event: Any) -> str:
        """One more; ranks 0, 1, ... failed so."""
        self.restart += 1
        made = {"nodes": ["n1", "n2"], "world_size": 4, "state": module.newest_state(self.folder)}
        name = self.files.begin(job_id="77", restart=self.restart, **made)  # type: ignore[arg-type]
        for rank, (kind, transient, text) in enumerate(failures):
            self.files.write_failure(name, Failure(rank, kind, transient, text))
        if event:
            self.files.note(name, **event)
        return name

    def log(self, text: str) -> None:
        """What the log of the first rank holds."""
        (self.folder / "logs" / "77_0_log.err").write_text(f"{text}\n")

    def save(self) -> None:
        state = self.folder / "checkpoints" / "last.safetensors"
        state.parent.mkdir(exist_ok=True)
        state.write_text(f"{self.restart}")

    def verdict(self, max_restarts: int = 3, **asked: Any) -> Failure | None:
        job = self.files.job()
        assert job is not None
        now = self.files.attempts()[-1]
        resources = {"max_restarts": max_restarts, "restart_wait": 30, **asked}
        return judge(self.files, replace(job, job_id=now.job_id, resources=resources), now)

    def failed(self, max_restarts: int = 3, **asked: Any) -> Failure:
        verdict = self.verdict(max_restarts, **asked)
        assert verdict is not None
        return verdict


@pytest.fixture
def run(tmp_path: Path) -> Run:
    submitted(tmp_path, job_id="77")
    return Run(tmp_path)


def test_a_rank_that_says_nothing_is_named(run: Run) -> None:
    run.attempt(LOST, LOST, LOST, outcome="failed", why="Connection closed by peer")
    why = "rank 3 ended without a word; starts again after 30 s, restart 1 of 3 in a row"
    assert run.verdict() == Failure(why=why, wait=30)
    run.attempt()  # nothing at all
    assert run.failed().wait == 30


def test_one_lasting_error_among_others_ends_the_run(run: Run) -> None:
    run.attempt(LOST, STALE, ("cause", False, "ValueError: boom"), outcome="failed")
    assert (run.failed().why, run.failed().wait) == ("rank 2: ValueError: boom", None)
    run.attempt(LOST, STALE, outcome="failed")  # a disk that was away is the reason that is told
    assert run.failed().why.startswith("rank 1: OSError: [Errno 116] Stale file handle; starts again")


@pytest.mark.parametrize(("saves", "wait"), [(False, None), (True, 30)])
@pytest.mark.parametrize("asked", ["mem", "mem_per_gpu"])
def test_memory_that_was_short_is_short_again_unless_something_was_saved(
    run: Run, saves: bool, wait: int | None, asked: str
) -> None:
    run.attempt(LOST, log_start=0)
    run.log("srun: error: n2: task 3: Out Of Memory")
    if saves:
        run.save()
    verdict = run.failed(**{"mem": None, asked: "60G"})
    assert (verdict.wait, verdict.why.endswith(f" --{asked}"), verdict.node) == (wait, not saves, "n2")
    assert verdict.why.startswith("out of memory: the system killed rank 3 on n2")


@pytest.mark.parametrize(
    ("failures", "log", "node"),
    [
        ([LOST, LOST, STALE], "", "n2"),
        ([LOST, STALE], "", "n1"),
        ([LOST], "", ""),  # nobody knows where the reason lies
        ([LOST], "srun: error: n2: task 3: Killed", "n2"),
        ([LOST], "srun: error: Node failure on n2", ""),  # which Slurm leaves out itself
    ],
)
def test_the_node_of_the_rank_that_failed_by_itself_is_named(
    run: Run, failures: list[Any], log: str, node: str
) -> None:
    run.attempt(*failures, log_start=0)
    run.log(log)
    verdict = run.failed()
    assert (verdict.wait, verdict.node) == (30, node)


def test_what_ended_as_it_should_or_was_told_to_stop_is_not_started_again(run: Run) -> None:
    for outcome in ("finished", "stopped"):
        run.attempt(outcome=outcome)
        assert run.verdict() is None
    run.attempt(LOST)
    run.files.stop_request("76").touch()
    assert run.failed().wait == 30
    run.files.stop_request("77").touch()
    assert run.verdict() is None
    run.files.stop_request("77").unlink()
    run.attempt(outcome="requeued", signal="SIGUSR2 (preempted)")  # and the scheduler did not take the order
    assert run.failed().wait == 0


@pytest.mark.parametrize(
    ("limit", "waits", "why"),
    [
        (3, [30, 60, 120, None], "3 restarts in a row brought no new state (--max_restarts)"),
        (1, [30, None], "1 restart in a row brought no new state (--max_restarts)"),
        (0, [None], "it is not started again (--max_restarts 0)"),
    ],
)
def test_each_wait_is_twice_the_one_before_until_the_limit(
    run: Run, limit: int, waits: list[int | None], why: str
) -> None:
    for wait in waits:
        run.attempt(LOST)
        verdict = run.failed(max_restarts=limit)
        assert verdict.wait == wait
        run.files.note(run.files.attempts()[-1].name, outcome="requeued", retried=True)
    assert why in verdict.why


def test_a_new_state_or_job_begins_the_count_anew(run: Run) -> None:
    run.attempt(LOST, retried=True)
    run.attempt(outcome="requeued", signal="SIGUSR2 (preempted)")  # which does not count
    run.attempt(LOST)
    assert run.failed().wait == 60
    for _ in range(2):
        run.attempt(LOST, retried=True)
    run.attempt(LOST)
    assert run.failed().wait is None
    run.save()
    assert run.failed().wait == 30
    run.attempt(LOST)
    assert run.failed().wait == 30, "restarts before the state do not count"
    for _ in range(3):
        run.attempt(LOST, retried=True)
    run.files.begin(job_id="78", restart=0, nodes=["n1"], world_size=4, state="")
    assert run.failed().wait == 30


class Slurm:
    """What it says of cell 1 of array 70, and what it was told."""

    def __init__(self) -> None:
        self.state, self.told, self.then = "RUNNING", list[str](), lambda: None
        self.nodes: str | None = ""
        self.excluded = "(null)"

    def ask(self, *words: str, **_: Any) -> str:
        if words[0] == "sinfo":
            if self.nodes is None:
                raise SILENT
            return self.nodes
        if words[1] == "--oneliner":
            fields = f"JobState={self.state} Restarts=0 NumNodes=1-1 ExcNodeList={self.excluded} Partition=main,low"
            return f"JobId=77 ArrayJobId=70 ArrayTaskId=1 {fields}\n"
        self.told.append(" ".join(words))
        self.then()
        return ""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm()
    for place in (module, scheduler):
        monkeypatch.setattr(place, "ask", made.ask)
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    for name, value in {"JOB_ID": 77, "ARRAY_JOB_ID": 70, "ARRAY_TASK_ID": 1, "RESTART_COUNT": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return made


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    """Of two cells, of which the second has lost a rank."""
    place = tmp_path / "jobs" / "launch-1"
    place.mkdir(parents=True)
    cells = [tmp_path / "cells" / name for name in "ab"]
    (place / "runs.json").write_text(json.dumps(list(map(str, cells))))
    files = submitted(cells[1], job_id="70_1", launch=str(place))
    files.begin(job_id="70_1", restart=0, nodes=["n1"], world_size=1, state="")
    return place


def cell(launch: Path) -> JobFolder:
    return JobFolder(launch.parent.parent / "cells" / "b")


def test_a_cell_is_asked_for_by_its_own_number_and_waits_in_the_queue(slurm: Slurm, launch: Path) -> None:
    assert main(launch, 137) == 137
    assert slurm.told == ["scontrol requeue incomplete 70_1", "scontrol update JobId=70_1 StartTime=now+30"]
    (attempt,) = cell(launch).attempts()
    assert (attempt.outcome, attempt.retried) == ("requeued", True)
    assert "starts again after 30 s" in attempt.why


@pytest.mark.parametrize(("state", "restart"), [("CANCELLED", 0), ("COMPLETING", 0), ("RUNNING", 1)])
def test_a_job_that_the_scheduler_has_ended_or_runs_again_is_left_alone(
    slurm: Slurm, launch: Path, state: str, restart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.state = state
    if restart:
        cell(launch).begin(job_id="70_1", restart=restart, nodes=["n1"], world_size=1, state="")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))  # and the scheduler says 0
    assert main(launch, 143) == 143
    assert slurm.told == []
    assert cell(launch).attempts()[-1].outcome is None


@pytest.mark.parametrize(
    ("nodes", "excluded", "left_out"),
    [
        ("n1\nn1\nn2\n", "(null)", "n1"),
        ("n1\nn2\nn3\n", "n2", "n2,n1"),
        ("n1\nn2\n", "n2", ""),  # else it would wait for ever
        (None, "(null)", ""),  # no answer, which stops no restart
    ],
)
def test_the_node_of_a_failed_rank_is_left_out_where_others_are_enough(
    slurm: Slurm, launch: Path, nodes: str | None, excluded: str, left_out: str
) -> None:
    slurm.nodes, slurm.excluded = nodes, excluded
    cell(launch).write_failure(cell(launch).attempts()[0].name, Failure(0, *STALE))
    assert main(launch, 1) == 1
    order = [f"scontrol update JobId=70_1 ExcNodeList={left_out}"] if left_out else []
    assert slurm.told[2:] == order
    assert cell(launch).attempts()[0].outcome == "requeued"


def test_a_stop_between_the_question_and_the_order_is_obeyed(slurm: Slurm, launch: Path) -> None:
    slurm.then = cell(launch).stop_request("70_1").touch
    main(launch, 137)
    assert slurm.told[-1] == "scancel 70_1"
    assert cell(launch).attempts()[0].outcome == "stopped"


def test_a_record_that_is_away_for_a_moment_is_waited_for(
    slurm: Slurm, launch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, away = JobFolder.attempts, [OSError(116, "Stale file handle")] * 2

    def attempts(self: JobFolder) -> Any:
        if away:
            raise away.pop()
        return real(self)

    monkeypatch.setattr(JobFolder, "attempts", attempts)
    main(launch, 137)
    assert len(slurm.told) == 2


def test_without_the_record_nothing_is_started_again(
    slurm: Slurm, launch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # no such attempt
    assert (main(launch, 137), slurm.told) == (137, [])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    away = failing(OSError(116, "Stale file handle"))
    monkeypatch.setattr(JobFolder, "note", away)  # it would not count, and go round for ever
    assert (main(launch, 137), slurm.told) == (137, [])
    assert "Stale file handle" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["question", "order"])
def test_a_scheduler_that_does_not_answer(
    slurm: Slurm, launch: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.then = failing(SILENT)
    if when == "question":
        monkeypatch.setattr(scheduler, "ask", failing(SILENT))
    assert main(launch, 137) == 137
    if when == "question":
        assert "not started again" in capsys.readouterr().err
    else:
        (attempt,) = cell(launch).attempts()
        assert (attempt.outcome, attempt.retried) == ("failed", False)
        assert "but: Slurm does not answer" in attempt.why


@pytest.mark.parametrize("where", ["folder", "neighbor"])
def test_a_folder_that_is_gone_beside_others_is_not_waited_for(tmp_path: Path, where: str) -> None:
    """One on a file system that is away, whose neighbors are away as well, is looked for thirty times."""
    run = tmp_path / "run"
    lines = script(Batch(run, [Task(["train"], run)], Request(gpus_per_node=0), 1)).splitlines()
    begin = lines.index("code=$?")
    assert lines[-1].startswith("exec sh ")
    assert "graftvit.launch.slurm.restart" in lines[-1]
    (run if where == "folder" else tmp_path / "other").mkdir()
    text = "\n".join(["sleep() { echo waits >&2; }", "(exit 7)", *lines[begin:]])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")
    shutil.rmtree(tmp_path)
    waited = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert (waited.returncode, waited.stderr.count("waits")) == (7, 30)
