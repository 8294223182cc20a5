"""What is read from the scheduler's answers: recorded ones first, then those of a real cluster."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import scheduler
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.scheduler import (
    REMOVED,
    NoAnswerError,
    NoSuchJobError,
    State,
    cancel,
    fallen_nodes,
    flags_beyond,
    job_fields,
    job_states,
    number_by_name,
    parse_accounting,
    parse_queue,
    reason_in,
    signal_job,
    waiting,
)
from graftvit.models.errors import GraftError
from support.runs.patience import until
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_config import ClusterOptions
from support.slurm.slurm_folders import failing

CLUSTER = ClusterOptions(accounting=True)
QUEUE = """\
12632732|FAILED|gpu1|NonZeroExitCode|0|1792|2026-11-21T12:13:56|2026-11-21T12:13:57|graftvit-x-0|/x/jobs/launch-0/submit.sh|
12632731_2|PENDING||JobArrayTaskLimit|0|0|N/A|N/A|graftvit-x-0|/x|y/jobs/launch-0/submit.sh|
12632730|RUNNING|gpu1,gpu2|None|2|0|2026-11-21T12:13:56|2026-11-21T12:33:56|graftvit-x-0|/x/jobs/launch-0/submit.sh|
12632729|CANCELLED|gpu1|None|0|15|2026-11-21T12:13:56|2026-11-21T12:13:57|graftvit-x-0|/x/jobs/launch-0/submit.sh|
50410830|FAILED|gpu1,gpu2|JobLaunchFailure|0|4021|2026-11-22T17:56:17|2026-11-22T17:56:17|graftvit-x-0|/x/jobs/launch-0/submit.sh|
"""
ACCOUNTING = """\
JobID|State|NodeList|ExitCode|Start|End|Reason
7|NODE_FAIL|gpu1|1:0|2026-11-21T12:00:00|2026-11-21T12:10:00|None
7|PREEMPTED|gpu2|0:0|2026-11-21T12:10:00|2026-11-21T12:20:00|None
7|CANCELLED by 1000|gpu3|0:15|2026-11-21T12:20:00|2026-11-21T12:30:00|None
8_[3-5,9%2]|PENDING|None assigned|0:0|Unknown|Unknown|None
8_[10-14:2,...]|PENDING|None assigned|0:0|Unknown|Unknown|None
"""
SIGNALLED = (
    "JobId=5 JobName=s JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts={restarts} "
    "ExitCode=0:0 StartTime=2026-11-21T12:00:00 EndTime={end} {preempt}Partition=main\n"
)


def test_the_queue_is_read() -> None:
    jobs = parse_queue(f"{QUEUE}no row of ours\n")
    assert (jobs["12632732"].exit_code, jobs["12632732"].reason) == ("7:0", "NonZeroExitCode")
    assert jobs["12632731_2"] == State(
        "PENDING", reason="JobArrayTaskLimit", exit_code="0:0", name="graftvit-x-0",
        script=Path("/x|y/jobs/launch-0/submit.sh"),
    )  # fmt: skip
    running = jobs["12632730"]
    assert (running.nodes, running.restarts) == (("gpu1", "gpu2"), 2)
    assert (running.end or 0) - (running.start or 0) == 1200
    assert jobs["12632729"].exit_code == "0:15"
    assert jobs["50410830"].exit_code == "0:53"


def test_the_accounting_tells_how_each_start_ended() -> None:
    jobs = parse_accounting(ACCOUNTING)
    assert jobs["7"].state == "CANCELLED"
    assert jobs["7"].history == ("NODE_FAIL", "PREEMPTED")
    assert jobs["7"].restarts == 2
    assert [name for name in jobs if name.startswith("8")] == [
        f"8_{cell}" for cell in (3, 4, 5, 9, 10, 12, 14)
    ]
    assert jobs["8_4"].nodes == ()
    lines = ["JobID|State|Restarts|JobName", "7|NODE_FAIL||old", "7|NODE_FAIL||new", "7|COMPLETED||new"]
    job = parse_accounting("\n".join(lines))["7"]  # jobs of one number are kept apart
    assert (job.name, job.history) == ("new", ("NODE_FAIL",))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preempt": "PreemptTime=2026-11-21T12:10:00 "}, "preempted"),
        ({"restarts": 1, "state": "COMPLETING"}, "requeued"),
        ({"state": "COMPLETING"}, "cancelled"),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, "time limit"),
        ({"state": "COMPLETING", "reason": "JobLaunchFailure"}, ""),
        ({"end": "2026-11-21T12:12:00"}, "time limit"),
        ({}, ""),
    ],
)
def test_the_reason_of_a_signal(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"state": "RUNNING", "reason": "None", "restarts": 0, "end": "2026-11-21T18:00:00"}
    answers(monkeypatch, scontrol=SIGNALLED.format(**{**values, "preempt": "PreemptTime=None ", **changes}))
    assert reason_in(job_fields("5"), 0, datetime(2026, 11, 21, 12, 10), 90) == reason


def test_fallen_nodes_are_those_that_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, sinfo="a idle\na idle\nb down*\nc mixed*\nd drained\ne failing\nf allocated\n")
    assert fallen_nodes(["a", "b", "c", "d", "e", "f"]) == ["b", "c", "e"]


def test_a_job_is_found_by_its_name_and_script(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "N/A|5|/x/other/submit.sh|\n7|9|/x|y/submit.sh|\nN/A|8|/x/submit.sh|\n"
    answers(monkeypatch, squeue=rows)
    found = [number_by_name("run", Path(place) / "submit.sh") for place in ("/x|y", "/x", "/y")]
    assert found == ["7", "8", ""]
    answers(monkeypatch, squeue=None)
    with pytest.raises(GraftError):
        number_by_name("run", Path("/x/submit.sh"))


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "waits for nodes: "),
        ("QOSMaxJobsPerUserLimit", "waits: "),
        ("AssocGrpCPUMinutesLimit", "waits: "),
        ("ReqNodeNotAvail, UnavailableNodes:n", "waits for nodes that are down, drained or reserved: "),
        ("Nodes required for job are DOWN", "waits for nodes that are down, drained or reserved: "),
        ("SomethingNew", "waits: "),
        ("BeginTime", "waits until its begin time: "),
        ("", ""),
    ],
)
def test_why_a_job_waits(reason: str, words: str) -> None:
    assert waiting(reason, {}) == (f"{words}{reason}" if reason else "")
    assert flags_beyond(reason, {}) == ()
    assert re.fullmatch(r"waits until .*\d\d:\d\d:\d\d: BeginTime", waiting("BeginTime", {}, 1.8e9))


@pytest.mark.parametrize(
    ("reason", "flags"),
    [
        ("PartitionTimeLimit", ["time"]),
        ("QOSMaxWallDurationPerJobLimit", ["time"]),
        ("PartitionNodeLimit", ["nodes"]),
        ("QOSMaxGRESPerJob", ["gpus_per_node", "time"]),
        ("MaxMemPerLimit", ["mem"]),
        ("InvalidQOS", ["qos"]),
        ("BadConstraints", ["constraint", "nodelist"]),
        ("QOSMinBurstBuffer", ["nodes", "time"]),
    ],
)
def test_a_limit_of_each_job_names_flags_that_there_are(reason: str, flags: list[str]) -> None:
    assert list(flags_beyond(reason, {})) == flags == [name for name in flags if name in Request.model_fields]
    assert re.findall(r"--(\w+)", waiting(reason, {"mem": None})) == flags
    by_gpu = [name.replace("mem", "mem_per_gpu") for name in flags]
    assert re.findall(r"--(\w+)", waiting(reason, {"mem_per_gpu": "60G"})) == by_gpu


def test_without_slurm_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraftError, match="squeue is not on this machine"):
        job_states(["1"])
    assert fallen_nodes(["a"]) == []
    assert scheduler.reason_of_signal("1") == ""


def test_a_scheduler_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    monkeypatch.setattr(subprocess, "run", failing(subprocess.TimeoutExpired("squeue", 15)))
    with pytest.raises(NoAnswerError, match=r"asked 3 times in .* no answer within 15 seconds"):
        job_states(["1"])
    assert scheduler.TRIES * scheduler.TIMEOUT + (scheduler.TRIES - 1) * 2 < 60


@pytest.mark.parametrize(
    ("said", "kind", "tries"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", NoAnswerError, 3),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", NoAnswerError, 3),
        ("scancel: error: Kill job error on job id 9: Access/permission denied", GraftError, 1),
        ("scancel: error: Kill job error on job id 9: Invalid job id specified", NoSuchJobError, 1),
        ("scancel: error: Kill job error on job id 9: Job can not be altered now, try again", GraftError, 1),
    ],
)
def test_only_a_controller_that_is_away_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[GraftError], tries: int
) -> None:
    calls = answers(monkeypatch, error=said, scancel=None, squeue=None)
    with pytest.raises(GraftError) as raised:
        cancel("9")
    assert type(raised.value) is kind
    assert said.rpartition(": ")[2] in str(raised.value)
    assert len(calls) == tries
    with pytest.raises(kind):
        cancel("10")
    assert len(calls) == (tries if kind is NoAnswerError else 2 * tries)  # not asked in vain again at once


AWAY = "error: Problem talking to the database: Connection refused"


def answers(monkeypatch: pytest.MonkeyPatch, error: str = AWAY, **said: str | None) -> list[Any]:
    """Each command of Slurm says this, or fails with the error; returns the calls."""
    calls: list[Any] = []

    def answer(words: Any, **_: Any) -> Any:
        calls.append(words)
        text = said[words[0]]
        return subprocess.CompletedProcess(words, text is None, stdout=text or "", stderr=f"{error}\n")

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(scheduler, "PAUSE", 0.0)
    monkeypatch.setattr(scheduler, "_silent", {})
    return calls


def test_accounting_that_is_away_hides_no_job_and_stops_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    row = "9|RUNNING|n1|None|0|0|N/A|N/A|run|/x/submit.sh|"
    answers(monkeypatch, squeue=row, sacct=None, scancel="")
    for _ in range(2):  # the second time, it is known that the accounting is away
        assert job_states(["9"])["9"].state == "RUNNING"
        cancel("9")


def test_what_the_queue_does_not_know_neither_waits_nor_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accounting hears late of an end, and for a time has no name for a job: sacct says `allocation`."""
    head = "JobID|State|NodeList|ExitCode|Start|End|Reason|JobName\n"
    rows = "8|RUNNING|n1|0:0|||None|run\n9|FAILED|n1|3:0|||None|allocation\n"
    answers(monkeypatch, squeue="", sacct=head + rows)
    found = job_states(["8", "9"])
    assert found["8"] == State()
    assert (found["9"].state, found["9"].name) == ("FAILED", "")
    answers(monkeypatch, error="slurm_load_jobs error: Invalid job id specified", squeue=None, sacct=None)
    assert job_states(["9"]) == {"9": State()}, "private jobs of another user"


def test_a_cell_that_slurm_forgot_beside_others_was_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = "7_[0,2%1]|PENDING||Priority|0|0|N/A|N/A|run|/x/submit.sh|"
    calls = answers(monkeypatch, squeue=row, sacct=None)
    found = job_states(["7_0", "7_1", "8_0", "7_2"])
    assert [state.state for state in found.values()] == ["PENDING", REMOVED, "UNKNOWN", "PENDING"]
    assert "--jobs=7,8" in calls[0]


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def state_when(job: str, ready: Callable[[State], bool]) -> State:
    """The first state of the job that is `ready`."""

    def found() -> State | None:
        state = job_states([job])[job]
        return state if ready(state) else None

    state = until(found, lambda: f"{job}: {job_states([job])}", every=0.1)
    assert state is not None
    return state


@pytest.mark.slurm
def test_real_jobs(on_cluster: SlurmCluster, tmp_path: Path) -> None:
    cluster = on_cluster
    array = cluster.sbatch("sleep 100", "--array=0-5%1")
    failed = cluster.sbatch("exit 7")
    mark, script = tmp_path / "usr2", tmp_path / "task.sh"
    wait = "while :; do sleep 0.1; done"
    script.write_text(f"trap 'echo $SLURM_PROCID >> {mark}' USR2; echo >> {mark}.ready; {wait}")
    wide = cluster.sbatch(f"srun bash {script}", "--nodes=2", "--ntasks-per-node=1")
    assert state_when(f"{array}_0", lambda job: job.state == "RUNNING").nodes == (cluster.nodes[0],)
    assert state_when(failed, lambda job: job.state == "FAILED").exit_code == "7:0"
    assert state_when(wide, lambda job: job.state == "RUNNING").nodes == tuple(cluster.nodes[:2])
    assert job_states([f"{array}_4", "1"]) == {
        f"{array}_4": State("PENDING", reason="JobArrayTaskLimit", exit_code="0:0", name="wrap"),
        "1": State(),
    }
    until(lambda: lines(Path(f"{mark}.ready")) == 2, "both tasks")
    signal_job(wide, "USR2")
    until(lambda: lines(mark) == 2, "the signal at both tasks")
    assert job_states([wide])[wide].state == "RUNNING"
    cancel(f"{array}_4")
    # the controller forgets a cell that never began at once, and the accounting never hears of it
    state_when(f"{array}_4", lambda job: job == State(REMOVED))
    cluster.kill_node(cluster.nodes[1])
    assert state_when(wide, lambda job: job.restarts == 1).state in ("COMPLETING", "PENDING")
    assert fallen_nodes(cluster.nodes) == [cluster.nodes[1]]
