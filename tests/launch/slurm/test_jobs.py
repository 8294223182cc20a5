"""What is said of runs and their jobs, from hand-written files and what the scheduler says of them."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from graftvit.launch.slurm import jobs, jobs_text
from graftvit.launch.slurm.folder import Failure, Job, JobFolder, remember
from graftvit.launch.slurm.jobs import Status, describe_runs, home, judge_jobs, run_folders
from graftvit.launch.slurm.jobs_text import Seen, describe, duration, watch
from graftvit.launch.slurm.lock import FILE, submitting
from graftvit.launch.slurm.plan import unfinished
from graftvit.launch.slurm.scheduler import REMOVED, State, parse_queue
from graftvit.models.errors import ConfigError, GraftError
from support.runs.typed import Typed
from support.slurm.slurm_folders import SILENT, FakeSlurm, attempted, failing, submitted

GONE = State()
PREEMPTED = {"signal": "SIGUSR2 (preempted)", "outcome": "requeued"}
CASES = [
    (State("PENDING", reason="Priority"), None, "pending", "waits behind jobs of higher priority: Priority"),
    (State("PENDING", restarts=1, reason="Resources"), PREEMPTED, "requeued", "waits for nodes: Resources"),
    (State("RUNNING"), None, "running", "starting"),
    (State("RUNNING"), {}, "running", ""),
    (State("RUNNING", restarts=1), PREEMPTED, "running", "starting"),
    (State("RUNNING"), {"signal": "SIGUSR2 (preempted)"}, "stopping", "SIGUSR2 (preempted)"),
    (State("COMPLETING"), {"outcome": "finished"}, "stopping", "finished"),
    (State("RUNNING"), {"outcome": "failed", "why": "OOM"}, "stopping", "failed: OOM"),
    (State("RUNNING"), PREEMPTED, "requeued", "SIGUSR2 (preempted)"),
    (State("COMPLETING", restarts=1), PREEMPTED, "requeued", "SIGUSR2 (preempted)"),
    (State("SUSPENDED"), {}, "running", "suspended"),
    (State("COMPLETING"), {}, "stopping", ""),
    (State("COMPLETED"), {"outcome": "finished"}, "finished", ""),
    (State("COMPLETED"), {"outcome": "stopped"}, "stopped", ""),
    (State("COMPLETED"), {}, "unknown", "ended without a word"),
    (State("FAILED"), {"outcome": "failed", "why": "OOM"}, "failed", "OOM"),
    (State("FAILED", reason="NonZeroExitCode", exit_code="7:0"), {}, "failed", "NonZeroExitCode, exit code 7"),
    (State("OUT_OF_MEMORY"), {}, "failed", "out of memory"),
    (State("FAILED"), {"outcome": "finished"}, "finished", ""),
    (State("CANCELLED"), {}, "cancelled", ""),
    (State("CANCELLED", restarts=1), PREEMPTED, "cancelled", ""),
    (State("TIMEOUT", reason="TimeLimit"), {}, "timed out", "TimeLimit"),
    (State("PREEMPTED"), {}, "preempted", ""),
    (State("NODE_FAIL"), {}, "node failed", ""),
    (GONE, {"outcome": "finished"}, "finished", ""),
    (GONE, {"outcome": "failed", "why": "OOM"}, "failed", "OOM"),
    (State(REMOVED), None, "cancelled", ""),
    (State(REMOVED), {}, "unknown", "ended without a word"),
    (GONE, {"signal": "SIGTERM (cancelled)"}, "unknown", "SIGTERM (cancelled)"),
    (GONE, {}, "unknown", "ended without a word"),
    (GONE, PREEMPTED, "unknown", "was to be requeued after SIGUSR2 (preempted), and did not begin again"),
    (GONE, None, "unknown", "it never began, and the scheduler no longer knows it"),
    (GraftError("squeue is gone"), {}, "unknown", "squeue is gone; attempt 1 has not said how it ended"),
    (GraftError("squeue is gone"), {"outcome": "stopped"}, "stopped", ""),
]  # fmt: skip
"""What the scheduler says, what the attempt left, and what is then said of the run."""


def described(folder: Path) -> Status:
    return describe_runs([folder])[0]


@pytest.fixture
def run(tmp_path: Path) -> JobFolder:
    """A run that was submitted as job 12."""
    return submitted(tmp_path / "run")


@pytest.mark.parametrize(("job", "event", "state", "why"), CASES)
def test_states(
    run: JobFolder, slurm: FakeSlurm, job: State | Exception, event: dict[str, Any] | None, state: str, why: str
) -> None:  # fmt: skip
    if event is not None:
        attempted(run.output_dir, **event)
    slurm.says(job)
    status = described(run.output_dir)
    assert (status.state, status.why) == (state, why)
    assert status.active == (state in ("pending", "requeued", "running", "stopping"))


def test_each_restart_has_its_reason(run: JobFolder, slurm: FakeSlurm) -> None:
    attempted(run.output_dir, **PREEMPTED)
    for restart, event in enumerate([{}, {"before": "node failure: gpu1"}, {}, {}], start=1):
        attempted(run.output_dir, restart=restart, **event)
    history = ("PREEMPTED", "NODE_FAIL", "NODE_FAIL", "FAILED")
    slurm.says(State("RUNNING", restarts=4, history=history))
    reasons = [restart.before for restart in described(run.output_dir).history]
    assert reasons == ["SIGUSR2 (preempted)", "node failure: gpu1", "node failure", "ended without a word"]
    run.stop_request("12").touch()
    submitted(run.output_dir, job_id="13")
    run.begin(job_id="13", restart=0, nodes=["gpu1"], world_size=1)
    slurm.says(State("RUNNING", restarts=2))
    status = described(run.output_dir)
    assert status.history[-1].before == "`graftvit jobs stop`"
    assert (len(status.history), status.restarts) == (5, 7), "two starts of job 13 wrote nothing"


def test_local_runs_live_as_long_as_their_process(tmp_path: Path) -> None:
    mine = str(os.getpid())  # which is no controller of submitit
    files = submitted(tmp_path, cluster="local", job_id=mine)
    files.begin(job_id=mine, restart=0, nodes=["gpu1"], world_size=2)
    assert described(tmp_path).why == "ended without a word"
    files.stop_request(mine).touch()
    assert described(tmp_path).state == "cancelled"


def test_a_full_disk_and_a_private_job_of_another_user_are_told(
    run: JobFolder, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    attempted(run.output_dir)
    slurm.says("COMPLETED")
    for free, why in ((0, f"; the file system of {run.output_dir} is full"), (1 << 30, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert described(run.output_dir).why == f"ended without a word{why}"
    slurm.says(GONE)
    monkeypatch.setattr(jobs.os, "getuid", lambda: run.folder.stat().st_uid + 1)
    status = described(run.output_dir)
    assert (status.state, status.over) == ("unknown", False)
    assert f"nothing of this job of {run.folder.owner()}" in status.why
    assert "jobs resume" not in typed("jobs", run.output_dir).out
    said = typed("jobs", "stop", run.output_dir, code=1)
    assert (said.out, "may continue" in said.err) == ("", True)


def test_an_earlier_job_that_lives_is_the_one_that_is_shown(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    for job in ("10", "11", "12"):
        submitted(tmp_path, job_id=job)
        (tmp_path / "logs" / f"{job}_0_log.out").write_text(f"words of {job}\n")
    slurm.says({"10": "RUNNING", "11": "PENDING", "12": "FAILED"})
    status = described(tmp_path)
    assert (status.job.job_id, status.state, status.others) == ("11", "pending", ["10"])
    assert "job 10 of this folder" in typed("jobs", tmp_path).out
    assert "words of 11" in typed("jobs", "logs", tmp_path).out
    slurm.says({"10": "RUNNING", "11": "PENDING", "12": "RUNNING"})
    assert described(tmp_path).others == ["10", "11"]
    assert [one.active for one in judge_jobs([tmp_path])[tmp_path]] == [True] * 3
    attempted(tmp_path, "finished")
    slurm.says(GONE)
    assert described(tmp_path).state == "finished"
    assert "words of 12" in typed("jobs", "logs", tmp_path).out
    submitted(tmp_path, job_id="13")
    assert described(tmp_path).state == "unknown", "what an earlier job said is not said of this one"


@pytest.mark.parametrize(
    ("job", "left"),
    [
        (State("RUNNING"), 500),
        (State("PENDING", restarts=1, reason="Resources", start=1.8e9), 900),
        (State("RUNNING", restarts=1), 900),
        (State("SUSPENDED"), 900),
    ],
    ids=["trains", "waits", "restarts", "is suspended"],
)
def test_the_time_left_is_counted_down_by_a_run_that_trains_alone(
    job: State, left: float, run: JobFolder, slurm: FakeSlurm
) -> None:
    """The last record is 400 seconds old, and 90 steps of 10 seconds were left then."""
    timed = {"epoch": 0, "step": 10, "seconds": 100.0, "images_per_second": 3.2, "total_steps": 100}
    (run.output_dir / "log.jsonl").write_text(json.dumps(timed) + "\n")
    os.utime(run.output_dir / "log.jsonl", (time.time() - 400,) * 2)
    attempted(run.output_dir, started=time.time() - 500)
    slurm.says(job)
    status = described(run.output_dir)
    assert status.progress.seconds_left == pytest.approx(left, abs=60)
    if status.state == "requeued":
        assert "left      0:15:00 once it runs\n" in describe(status)
        assert "starts    expected at " in describe(status)


@pytest.mark.parametrize("line", ["jobs run", "jobs stop run", "submit run.yaml --unchecked --cluster local"])
def test_a_job_whose_record_is_damaged_is_not_called_none(
    line: str, tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}/run\n")
    files = submitted(tmp_path / "run")
    (files.folder / "submissions" / "0001.json").write_text('{"job_id": "1')
    assert "0001.json is damaged" in typed(line, code=2).err


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ConfigError, match=r"techer is no folder: did you mean '.*/teacher'\?"):
        run_folders(tmp_path / "techer")
    with pytest.raises(ConfigError, match="never submitted"):
        describe_runs([tmp_path])
    seed = submitted(tmp_path / "cells" / "seed=0").output_dir
    (tmp_path / "cells" / "seed=1").mkdir()
    assert run_folders(tmp_path) == [seed]
    teacher = submitted(tmp_path / "teacher").output_dir
    assert run_folders(tmp_path) == [teacher, seed]
    submitted(tmp_path)
    assert run_folders(tmp_path) == [tmp_path, teacher, seed]
    assert {home(one) for one in (tmp_path, teacher, seed)} == {tmp_path}


def test_a_number_that_never_came_back_is_found_and_written_down(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Of two cells, of which the scheduler was told."""
    launch, cells = tmp_path / "jobs" / "launch-0", [tmp_path / "cells" / name for name in "ab"]
    launch.mkdir(parents=True)
    for index, cell in enumerate(cells):
        submitted(cell, job_id="", launch=str(launch), index=index)
    slurm.says("RUNNING")
    slurm.numbers(error=GraftError("squeue failed: no configuration"))
    with pytest.raises(GraftError, match="no configuration"):
        judge_jobs(cells, strict=True)
    (status,) = describe_runs(cells[:1])
    assert (status.state, status.job.job_id, status.over) == ("unknown", "", False)
    slurm.numbers("7")
    assert [one.job.job_id for one in describe_runs(cells)] == ["7_0", "7_1"]
    slurm.numbers()
    assert described(cells[1]).job.job_id == "7_1"


def test_what_never_came_to_a_job_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm
) -> None:
    launch = tmp_path / "jobs" / "launch-0"
    launch.mkdir(parents=True)
    files = submitted(tmp_path, job_id="", launch=str(launch), submitted=time.time())
    slurm.says(GONE)
    slurm.numbers()

    def states() -> list[str]:
        return [f"{one.state}: {one.why}" for one in judge_jobs([tmp_path])[tmp_path]]

    waits = ["pending: is being submitted"]
    assert states() == []
    with FileLock(tmp_path / FILE):  # another command submits it at this moment
        assert states() == waits
    with submitting(tmp_path):  # this one does, and what it finds was left by one that was killed
        assert states() == []
    (launch / jobs.UNSURE).touch()  # an answer of sbatch was lost
    assert states() == waits
    monkeypatch.setattr(jobs, "LATE", 0.0)
    assert states() == []
    monkeypatch.setattr(jobs, "is_ordered", lambda script: script == launch / "submit.sh")  # by an orphan
    assert states() == waits
    assert len(files.jobs()) == 1


def test_an_interrupted_submission_hides_no_other_run(tmp_path: Path, slurm: FakeSlurm, typed: Typed) -> None:
    for name, job in (("cut", ""), ("whole", "7")):
        submitted(tmp_path / name, job_id=job, launch=str(tmp_path / name / "launch"))
        remember(tmp_path / name)
    slurm.says("RUNNING")
    slurm.numbers()
    found = [(one["state"], one["job_id"]) for one in json.loads(typed("jobs --json").out)]
    assert found == [("cancelled", ""), ("running", "7")]
    assert "no job came of it" in typed("jobs", tmp_path / "cut").out
    assert "it is cancelled" in typed("jobs", "stop", tmp_path / "cut").out


@pytest.mark.parametrize("action", ["", "stop", "logs", "resume", "summary"])
def test_what_is_no_run_is_refused_by_each_action(action: str, tmp_path: Path, typed: Typed) -> None:
    why = {"summary": "is not a sweep"}.get(action, "was never submitted")
    assert why in typed(f"jobs {action}", tmp_path, code=2).err
    assert "'' is not a folder: give the folder of a run" in typed(f"jobs {action}", "", code=2).err


@pytest.mark.parametrize(
    ("name", "launch", "own"),
    [
        ("", "", True),  # where nothing tells
        ("graftvit-run-0", "", True),
        ("other", "", False),
        ("other", "launch-0", True),  # somebody has given it another name
        ("other", "launch-1", False),
    ],
)
def test_a_job_whose_number_came_again_is_known_by_its_name_or_script(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed, name: str, launch: str, own: bool
) -> None:
    """A number comes again where Slurm's counter was reset, or where two clusters share one home."""
    submitted(tmp_path, name="graftvit-run-0", launch=str(tmp_path / "launch-0"))
    script = str(tmp_path / launch / "submit.sh") if launch else ""
    row = f"12|RUNNING|n1|None|0|0|2026-11-21T12:13:56|2026-11-21T12:33:56|{name}|{script}|"
    slurm.says(parse_queue(row)["12"])
    assert described(tmp_path).active == own
    if not own:
        assert "has no waiting or running job" in typed("jobs", "stop", tmp_path, "--now").out
        assert list(unfinished(tmp_path)) == [tmp_path]
    submitted(tmp_path)  # a record without a name
    assert described(tmp_path).active


def test_all_remembered_runs_in_a_table_active_ones_and_the_last(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no run of this user is listed" in typed("jobs").out
    for number, name in enumerate(("old", "mid", "new")):
        submitted(tmp_path / name, job_id=str(20 + number), submitted=float(number))
        remember(tmp_path / name)
    remember(tmp_path)  # no run any more
    slurm.says({"20": "RUNNING", "21": "FAILED", "22": State("PENDING", reason="Priority")})
    lines = typed("jobs").out.splitlines()
    assert lines[0].split()[:3] == ["run", "job", "state"]
    assert "pending (waits behind jobs of higher priority: Priority)" in lines[3]
    assert lines[-1] == "3 runs: 1 running, 1 failed, 1 pending"

    def names(line: str) -> list[str]:
        lines = [line for line in typed(line).out.splitlines() if line.startswith(str(tmp_path))]
        return [Path(line.split()[0]).name for line in lines]

    assert names("jobs --active") == ["old", "new"]
    assert names("jobs --failed") == ["mid"]
    monkeypatch.setattr(jobs_text, "usage_of", lambda ids: [])
    assert names("jobs --cost --failed") == ["mid"]
    assert names("jobs --last 2") == ["mid", "new"]
    assert names("jobs --active --last 1") == ["new"]
    slurm.says(GONE)
    assert typed("jobs --active").out == "no run waits or runs\n"
    assert typed("jobs --failed").out == "no run has failed\n"
    typed("jobs --failed --active", code=2)
    typed("jobs --failed --watch", code=2)
    typed("jobs --last 0", code=2)
    typed("jobs --watch --json", code=2)


def test_one_run_at_length_and_as_json(run: JobFolder, slurm: FakeSlurm, typed: Typed) -> None:
    attempted(run.output_dir, **PREEMPTED)
    name = run.begin(job_id="12", restart=1, nodes=["gpu2"], world_size=2)
    run.note(name, outcome="failed", why="ValueError: boom")
    run.write_failure(name, Failure(1, "cause", False, "Traceback\nValueError: boom\n"))
    slurm.says(State("FAILED", restarts=1, nodes=("gpu2",)))
    text = typed("jobs", run.output_dir).out
    assert "state     failed: ValueError: boom" in text
    assert "attempt 2 on gpu2, after: SIGUSR2 (preempted)" in text
    assert "last words of rank 1:\n  Traceback\n  ValueError: boom\n" in text
    assert f"`graftvit jobs resume {run.output_dir}` resumes" in text
    assert [duration(value) for value in (None, 0.4, 3723, 90061)] == ["", "0:00:00", "1:02:03", "1-01:01:01"]
    (found,) = json.loads(typed("jobs --json", run.output_dir).out)
    assert (found["state"], found["error_rank"], found["restarts"]) == ("failed", 1, 1)
    assert [one["attempt"] for one in found["history"]] == [2]


def test_names_of_cells_are_paths_that_a_shell_and_other_commands_take(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [f"my sweep/cells/lr=1e-3,seed={seed}" for seed in (0, 1)]
    for cell in cells:
        submitted(tmp_path / cell)
    slurm.says("RUNNING")
    for given in ("my sweep", tmp_path / "my sweep"):
        names = [shlex.split(line)[0] for line in typed("jobs", given).out.splitlines()[1:3]]
        assert [Path(name).absolute() for name in names] == [tmp_path / cell for cell in cells]
        assert f"graftvit jobs '{tmp_path}/{cells[0]}'" in typed("jobs", "logs", names[0]).err


def test_without_an_answer_the_files_are_told_and_that_they_are_all(
    run: JobFolder, slurm: FakeSlurm, typed: Typed
) -> None:
    attempted(run.output_dir)
    slurm.says(SILENT)
    written = typed("jobs", run.output_dir)
    assert "unknown: Slurm does not answer; attempt 1 has not said how it ended" in written.out
    assert written.err.count("Slurm does not answer: asked 3 times in 29 seconds") == 1
    assert not described(run.output_dir).over
    with pytest.raises(GraftError, match="Slurm does not answer"):
        judge_jobs([run.output_dir], strict=True)


def status(state: str, **values: Any) -> Status:
    job = Job(job_id="12", cluster="slurm", submitted=0.0, command=[], logs="", resources={}, code="")
    return Status(Path("/r"), job, State(start=1.8e9), state, **values)


PENDING, RUNNING = status("pending", why="waits for nodes: Resources"), status("running")
UNANSWERED = status("unknown", problem="Slurm does not answer: no")
FINISHED = status("finished")


def shown(monkeypatch: pytest.MonkeyPatch, *states: Status | None) -> str:
    """What is written of one run; None where it is not among those to show."""
    left, file = list(states), io.StringIO()
    monkeypatch.setattr(jobs_text, "EVERY", 0.0)

    def look() -> Seen:
        run = left.pop(0)
        return ([], []) if run is None else ([run], ["/r"])

    watch(look, file, "nothing waits\n")
    assert not left
    return file.getvalue()


def test_a_watched_run_is_a_table_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    states = (PENDING, PENDING, RUNNING, RUNNING, UNANSWERED, FINISHED)
    text = shown(monkeypatch, *states)
    assert text.count("restarts\n") == 4
    places = [text.find(word) for word in ("pending", "running", "Slurm does not answer", "finished")]
    assert places == sorted(places)
    assert places[0] > 0
    assert "waits for nodes: Resources; expected at" in text
    text = shown(monkeypatch, RUNNING, None)  # it ends, with --active
    assert text.count("nothing waits") == 1
    assert text.endswith("nothing waits\n")


def test_watching_is_left_by_ctrl_c_without_a_failure(
    run: JobFolder, slurm: FakeSlurm, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says("RUNNING")
    monkeypatch.setattr(jobs_text.time, "sleep", failing(KeyboardInterrupt()))
    typed("jobs", run.output_dir, "--watch")
