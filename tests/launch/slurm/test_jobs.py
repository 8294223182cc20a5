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
from graftvit.launch.slurm import jobs, jobs_text
from graftvit.launch.slurm.batch import job_name
from graftvit.launch.slurm.failures import Failure
from graftvit.launch.slurm.job_folder import JobFolder, known, registry_file, remember
from graftvit.launch.slurm.jobs import RunStatus, describe_run, judge_jobs, read_progress, run_folders
from graftvit.launch.slurm.jobs_text import Seen, describe, duration, watch
from graftvit.launch.slurm.lookup import is_alive
from graftvit.launch.slurm.scheduler import JobState, parse_queue
from graftvit.launch.slurm.stopping import find_unfinished
from graftvit.models.errors import ConfigError, GraftError
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import SILENT, FakeSlurm, attempted, submitted

GONE = JobState()
PREEMPTED = {"signal": "SIGUSR2 (preempted)", "outcome": "requeued"}
CASES = [
    (JobState("PENDING", reason="Priority"), None, "pending", "waits behind jobs of higher priority: Priority"),
    (JobState("PENDING", restarts=1, reason="Resources"), PREEMPTED, "requeued", "waits for nodes: Resources"),
    (JobState("RUNNING"), None, "running", "starting"),
    (JobState("RUNNING"), {}, "running", ""),
    (JobState("RUNNING", restarts=1), PREEMPTED, "running", "starting"),
    (JobState("RUNNING"), {"signal": "SIGUSR2 (preempted)"}, "stopping", "SIGUSR2 (preempted)"),
    (JobState("COMPLETING"), {"outcome": "finished"}, "stopping", "finished"),
    (JobState("RUNNING"), {"outcome": "failed", "why": "OOM"}, "stopping", "failed: OOM"),
    (JobState("RUNNING"), PREEMPTED, "requeued", "SIGUSR2 (preempted)"),
    (JobState("COMPLETING"), {}, "stopping", ""),
    (JobState("COMPLETED"), {"outcome": "finished"}, "finished", ""),
    (JobState("COMPLETED"), {"outcome": "stopped"}, "stopped", ""),
    (JobState("COMPLETED"), {}, "unknown", "ended without a word"),
    (JobState("FAILED"), {"outcome": "failed", "why": "OOM"}, "failed", "OOM"),
    (JobState("FAILED", reason="NonZeroExitCode", exit_code="7:0"), {}, "failed", "NonZeroExitCode, exit code 7"),
    (JobState("OUT_OF_MEMORY"), {}, "failed", "out of memory"),
    (JobState("FAILED"), {"outcome": "finished"}, "finished", ""),
    (JobState("CANCELLED"), {}, "cancelled", ""),
    (JobState("CANCELLED", restarts=1), PREEMPTED, "cancelled", ""),
    (JobState("TIMEOUT", reason="TimeLimit"), {}, "timed out", "TimeLimit"),
    (JobState("PREEMPTED"), {}, "preempted", ""),
    (JobState("NODE_FAIL"), {}, "node failed", ""),
    (GONE, {"outcome": "finished"}, "finished", ""),
    (GONE, {"outcome": "failed", "why": "OOM"}, "failed", "OOM"),
    (GONE, {"signal": "SIGTERM (cancelled)"}, "cancelled", "SIGTERM (cancelled)"),
    (GONE, {"signal": "SIGTERM (time limit)"}, "timed out", "SIGTERM (time limit)"),
    (GONE, {}, "unknown", "ended without a word"),
    (GONE, PREEMPTED, "unknown", "was to be requeued after SIGUSR2 (preempted), and did not begin again"),
    (GONE, None, "unknown", "it never began, and the scheduler no longer knows it"),
    (GraftError("squeue is gone"), {}, "unknown", "squeue is gone; attempt 1 has not said how it ended"),
    (GraftError("squeue is gone"), {"outcome": "stopped"}, "stopped", ""),
]  # fmt: skip
"""What the scheduler says, what the attempt left, and what is then said of the run."""


@pytest.fixture
def run(tmp_path: Path) -> JobFolder:
    """A run that was submitted as job 12."""
    return submitted(tmp_path / "run")


@pytest.mark.parametrize(("job", "event", "state", "why"), CASES)
def test_states(
    run: JobFolder, slurm: FakeSlurm, job: JobState | Exception, event: dict[str, Any] | None, state: str, why: str
) -> None:  # fmt: skip
    if event is not None:
        attempted(run.output_dir, **event)
    slurm.says(job)
    status = describe_run(run.output_dir)
    assert (status.state, status.why) == (state, why)
    assert status.active == (state in ("pending", "requeued", "running", "stopping"))


def test_what_an_earlier_job_said_is_not_said_of_this_one(run: JobFolder, slurm: FakeSlurm) -> None:
    attempted(run.output_dir, "finished")
    submitted(run.output_dir, job_id="13")
    slurm.says(GONE)
    assert describe_run(run.output_dir).state == "unknown"


def test_each_restart_has_its_reason(run: JobFolder, slurm: FakeSlurm) -> None:
    attempted(run.output_dir, **PREEMPTED)
    for restart, event in enumerate([{}, {"before": "node failure: gpu1"}, {}, {}], start=1):
        attempted(run.output_dir, restart=restart, **event)
    history = ("PREEMPTED", "NODE_FAIL", "NODE_FAIL", "FAILED")
    slurm.says(JobState("RUNNING", restarts=4, history=history))
    reasons = [restart.why for restart in describe_run(run.output_dir).restarts]
    assert reasons == ["SIGUSR2 (preempted)", "node failure: gpu1", "node failure", "ended without a word"]


def test_a_restart_after_a_stop_names_the_stop(run: JobFolder, slurm: FakeSlurm) -> None:
    attempted(run.output_dir, **PREEMPTED)
    attempted(run.output_dir, "stopped", restart=1, signal="SIGUSR2")
    run.stop_request("12").touch()
    submitted(run.output_dir, job_id="13")
    run.note(run.begin(job_id="13", restart=0, nodes=["gpu1"], world_size=1), signal="SIGUSR2")
    slurm.says("RUNNING")
    reasons = [restart.why for restart in describe_run(run.output_dir).restarts]
    assert reasons == ["SIGUSR2 (preempted)", "`graftvit jobs stop`"]


def test_the_error_is_that_of_the_rank_that_failed_first(run: JobFolder, slurm: FakeSlurm) -> None:
    name = attempted(run.output_dir, "failed", why="boom")
    run.write_failure(name, Failure(1, "consequence", True, "neighbor is gone\n"))
    run.write_failure(name, Failure(3, "cause", False, "Traceback\nValueError: boom\n"))
    os.utime(run.folder / "errors" / f"{name}-3.txt", (1, 1))
    slurm.says("FAILED")
    status = describe_run(run.output_dir)
    assert (status.error_rank, status.error) == (3, "Traceback\nValueError: boom\n")


def test_where_no_rank_wrote_its_error_the_log_tells(run: JobFolder, slurm: FakeSlurm) -> None:
    attempted(run.output_dir)
    for rank, text in enumerate(("all is well\n", "Traceback\nSegmentation error\n")):
        (run.output_dir / "logs" / f"12_{rank}_log.err").write_text(text)
    slurm.says("FAILED")
    status = describe_run(run.output_dir)
    assert (status.error_rank, status.error) == (1, "Traceback\nSegmentation error\n")


def test_local_runs_live_as_long_as_their_process(tmp_path: Path) -> None:
    mine = str(os.getpid())
    files = submitted(tmp_path / "run", cluster="local", job_id=mine)
    submission = files.submission()
    assert submission is not None
    assert not is_alive(submission)  # this process is no controller of submitit
    files.begin(job_id=mine, restart=0, nodes=["gpu1"], world_size=2)
    assert describe_run(tmp_path / "run").why == "ended without a word"
    files.stop_path.touch()
    assert describe_run(tmp_path / "run").state == "cancelled"


@pytest.mark.parametrize(("free", "why"), [(0, "; the file system of {} is full"), (1 << 30, "")])
def test_who_could_not_write_his_last_word_on_a_full_disk_is_told_so(
    free: int, why: str, run: JobFolder, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempted(run.output_dir)
    slurm.says("COMPLETED")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert describe_run(run.output_dir).why == f"ended without a word{why.format(run.output_dir)}"


def test_a_private_job_of_another_user_is_not_said_to_be_over(
    run: JobFolder, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempted(run.output_dir)
    slurm.says(GONE)
    monkeypatch.setattr(jobs.os, "getuid", lambda: run.folder.stat().st_uid + 1)
    status = describe_run(run.output_dir)
    assert (status.state, "of another user" in status.why) == ("unknown", True)


def test_an_earlier_job_that_lives_is_the_one_that_is_shown(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    for job in ("10", "11", "12"):
        submitted(tmp_path, job_id=job)
        (tmp_path / "logs" / f"{job}_0_log.out").write_text(f"words of {job}\n")
    slurm.says({"10": "RUNNING", "11": "PENDING", "12": "FAILED"})
    status = describe_run(tmp_path)
    assert (status.job_id, status.state, status.others) == ("11", "pending", ["10"])
    assert "job 10 of this folder" in typed("jobs", tmp_path).out
    assert "words of 11" in typed("jobs", "logs", tmp_path).out
    slurm.says({"10": "RUNNING", "11": "PENDING", "12": "RUNNING"})
    assert describe_run(tmp_path).others == ["10", "11"]
    assert [one.active for one in judge_jobs([tmp_path])[tmp_path]] == [True] * 3
    slurm.says("FAILED")
    assert "words of 12" in typed("jobs", "logs", tmp_path).out


def log(folder: Path, records: list[dict[str, Any]], settings: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(settings)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text + '{"epoch": 9, "st')


TIMED = {"seconds": 20.0, "images_per_second": 64.0}


def test_progress_and_the_time_left(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"epoch": 0, "step": 0, "teacher_top1": 90.0},
        {"epoch": 0, "step": 10, **TIMED},
        {"epoch": 0, "step": 10, "n_parameters": 5, "test_top1": 40.0, "test_ema_top1": 50.0, **TIMED},
        {"epoch": 1, "step": 20, **TIMED},
        {"epoch": 1, "step": 20, "n_parameters": 5, "test_top1": 41.0, "test_ema_top1": 45.0, **TIMED},
        {"epoch": 2, "step": 25, **TIMED, "seconds": 10.0},
    ]
    assert read_progress(tmp_path).total_steps is None  # before the first record
    log(tmp_path, records, "optim:\n  epochs: 10\n")
    found = read_progress(tmp_path)
    assert (found.step, found.total_steps, found.epoch, found.epochs) == (25, 100, 2, 10)
    assert (found.last_top1, found.best_top1, found.images_per_second) == (45.0, 50.0, 64.0)
    assert found.seconds_left == pytest.approx(150, abs=10)


def test_a_record_that_timed_no_step_does_not_make_the_run_fast(tmp_path: Path) -> None:
    """As of a run that was stopped at the end of an epoch."""
    records = [{"epoch": 0, "step": 10, "n_parameters": 5, **TIMED},
               {"epoch": 1, "step": 20, "n_parameters": 5, "seconds": 0.001}]  # fmt: skip
    log(tmp_path, records, "optim:\n  epochs: 10\n")
    found = read_progress(tmp_path)
    assert (found.images_per_second, found.seconds_left) == (64.0, pytest.approx(160))


def test_progress_of_a_recipe_with_stages(tmp_path: Path) -> None:
    log(tmp_path / "2-tune", [{"epoch": 0, "step": 3, "seconds": 3.0}], "optim:\n  max_steps: 4\n")
    log(tmp_path / "1-fit", [{"epoch": 0, "step": 9}], "optim:\n  max_steps: 9\n")
    found = read_progress(tmp_path)
    assert (found.stage, found.step, found.total_steps) == ("2-tune", 3, 4)


AGE, LEFT = 400.0, 900.0
"""Seconds since the last record, and of the 90 steps that were left then."""


@pytest.mark.parametrize(
    ("job", "ages", "left"),
    [
        (JobState("RUNNING"), [AGE + 100], pytest.approx(LEFT - AGE, abs=60)),
        (JobState("PENDING", restarts=1), [AGE + 100], LEFT),
        (JobState("CONFIGURING", restarts=1), [AGE + 100], LEFT),
        (JobState("RUNNING", restarts=1), [AGE + 100], LEFT),
        (JobState("CANCELLED", restarts=1), [AGE + 100], LEFT),
        (JobState("RUNNING", restarts=1), [AGE + 100, AGE / 2], LEFT),
    ],
    ids=["trains", "waits", "is configured", "restarts", "was cancelled", "before its first record"],
)
def test_the_time_left_is_counted_down_by_a_run_that_trains_alone(
    job: JobState, ages: list[float], left: Any, run: JobFolder, slurm: FakeSlurm
) -> None:
    timed = {"epoch": 0, "step": 10, "seconds": 100.0, "images_per_second": 3.2}
    log(run.output_dir, [timed], "optim:\n  max_steps: 100\n")
    os.utime(run.output_dir / "log.jsonl", (time.time() - AGE,) * 2)
    for restart, age in enumerate(ages):
        attempted(run.output_dir, restart=restart, started=time.time() - age)
    slurm.says(job)
    assert describe_run(run.output_dir).progress.seconds_left == left
    if job.state == "PENDING":
        slurm.says(JobState("PENDING", restarts=1, reason="Resources", start=1.8e9))
        text = describe(describe_run(run.output_dir))
        assert "left      0:15:00 once it runs\n" in text
        assert "starts    expected at " in text


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        run_folders(tmp_path / "nowhere")
    submitted(tmp_path / "cells" / "seed=0")
    (tmp_path / "cells" / "seed=1").mkdir()
    assert run_folders(tmp_path) == [tmp_path / "cells" / "seed=0"]


@pytest.mark.parametrize("action", ["", "stop", "logs", "resume", "forget", "summary"])
def test_what_is_no_run_is_refused_by_each_action(action: str, tmp_path: Path, typed: Typed) -> None:
    why = {"forget": "is not in the list", "summary": "is not a sweep"}.get(action, "was never submitted")
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
    tmp_path: Path, slurm: FakeSlurm, name: str, launch: str, own: bool
) -> None:
    """A number comes again where Slurm's counter was reset, or where two clusters share one home."""
    submitted(tmp_path, name="graftvit-run-0", launch=str(tmp_path / "launch-0"))
    script = str(tmp_path / launch / "submit.sh") if launch else ""
    row = f"12|RUNNING|n1|None|0|0|2026-11-21T12:13:56|2026-11-21T12:33:56|10:00|{name}|{script}|"
    slurm.queue()
    slurm.says(parse_queue(row)["12"])
    assert describe_run(tmp_path).active == own
    submitted(tmp_path)  # a record without a name
    assert describe_run(tmp_path).active


@pytest.mark.slurm
def test_the_job_of_somebody_else_is_never_shown_waited_for_or_cancelled(
    on_cluster: SlurmCluster, tmp_path: Path, typed: Typed
) -> None:
    wrapped = ("sbatch", "--parsable", "--output=/dev/null", "--job-name=other", "--wrap", "sleep 100")
    job = on_cluster.run(*wrapped).strip()
    submitted(tmp_path, job_id=job, name=job_name(tmp_path))
    attempted(tmp_path, "stopped")
    assert describe_run(tmp_path).state == "unknown"
    for words in ([], ["--now"]):
        assert "has no waiting or running job" in typed("jobs", "stop", tmp_path, *words).out
    assert list(find_unfinished(tmp_path).submissions) == [tmp_path]
    assert on_cluster.run("squeue", "--noheader", f"--jobs={job}", "--states=PENDING,RUNNING").strip()
    on_cluster.run("scancel", job)


def test_the_registry_keeps_the_order_and_forgets_what_is_gone(tmp_path: Path) -> None:
    assert known() == []
    for name in ("a", "b", "c", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        remember(tmp_path / name)
    (tmp_path / "b").rmdir()
    assert known() == [tmp_path / "c", tmp_path / "a"]


def test_a_home_that_cannot_be_written_stops_no_submission(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    remember(tmp_path)
    assert not registry_file().exists()


def test_all_remembered_runs_in_a_table(tmp_path: Path, slurm: FakeSlurm, typed: Typed) -> None:
    assert "no run of this user is listed" in typed("jobs").out
    for name in ("one", "two"):
        submitted(tmp_path / name)
        remember(tmp_path / name)
    remember(tmp_path)  # no run any more
    slurm.says(JobState("PENDING", reason="Priority"))
    lines = typed("jobs").out.splitlines()
    assert lines[0].split()[:3] == ["run", "job", "state"]
    assert "pending (waits behind jobs of higher priority: Priority)" in lines[1]
    assert lines[-1] == "2 runs: 2 pending"


def test_active_runs_and_the_last_ones(tmp_path: Path, slurm: FakeSlurm, typed: Typed) -> None:
    for number, name in enumerate(("old", "mid", "new")):
        submitted(tmp_path / name, job_id=str(20 + number), submitted=float(number))
        remember(tmp_path / name)
    slurm.says({"20": "RUNNING", "21": "FAILED", "22": "PENDING"})

    def names(line: str) -> list[str]:
        lines = [line for line in typed(line).out.splitlines() if line.startswith(str(tmp_path))]
        return [Path(line.split()[0]).name for line in lines]

    assert names("jobs --active") == ["old", "new"]
    assert names("jobs --last 2") == ["mid", "new"]
    assert names("jobs --active --last 1") == ["new"]
    slurm.says(GONE)
    assert typed("jobs --active").out == "no run waits or runs\n"
    typed("jobs --last 0", code=2)
    typed("jobs --watch --json", code=2)


def test_one_run_at_length_and_as_json(run: JobFolder, slurm: FakeSlurm, typed: Typed) -> None:
    attempted(run.output_dir, **PREEMPTED)
    name = run.begin(job_id="12", restart=1, nodes=["gpu2"], world_size=2)
    run.note(name, outcome="failed", why="ValueError: boom")
    run.write_failure(name, Failure(1, "cause", False, "Traceback\nValueError: boom\n"))
    slurm.says(JobState("FAILED", restarts=1, nodes=("gpu2",)))
    text = typed("jobs", run.output_dir).out
    assert "state     failed: ValueError: boom" in text
    assert "attempt 2 on gpu2, after: SIGUSR2 (preempted)" in text
    assert "last words of rank 1:\n  Traceback\n  ValueError: boom\n" in text
    assert f"`graftvit jobs resume {run.output_dir}` resumes" in text
    (found,) = json.loads(typed("jobs --json", run.output_dir).out)
    assert (found["state"], found["error_rank"], found["restarts"][0]["attempt"]) == ("failed", 1, 2)


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
    assert not describe_run(run.output_dir).over
    with pytest.raises(GraftError, match="Slurm does not answer"):
        judge_jobs([run.output_dir], strict=True)


def test_durations() -> None:
    assert [duration(value) for value in (None, 0.4, 3723, 90061)] == ["", "0:00:00", "1:02:03", "1-01:01:01"]


PENDING = RunStatus(Path("/r"), "12", "slurm", 0.0, "pending", "waits for nodes: Resources", starts=1.8e9)
RUNNING = RunStatus(Path("/r"), "12", "slurm", 0.0, "running")
UNANSWERED = RunStatus(Path("/r"), "12", "slurm", 0.0, "unknown", problem="Slurm does not answer: no")
FINISHED = RunStatus(Path("/r"), "12", "slurm", 0.0, "finished")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, file: io.StringIO, *states: RunStatus | None) -> str:
    """What is written of one run; None where it is not among those to show."""
    left = list(states)
    monkeypatch.setattr(jobs_text, "EVERY", 0.0)
    monkeypatch.setenv("TERM", "xterm")

    def look() -> Seen:
        run = left.pop(0)
        return ([], []) if run is None else ([run], ["/r"])

    watch(look, file, "nothing waits\n")
    assert not left
    return file.getvalue()


def test_a_watched_run_is_a_table_for_each_change_or_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    states = (PENDING, PENDING, RUNNING, RUNNING, UNANSWERED, FINISHED)
    text = shown(monkeypatch, io.StringIO(), *states)
    assert text.count("restarts\n") == 4
    places = [text.find(word) for word in ("pending", "running", "Slurm does not answer", "finished")]
    assert places == sorted(places)
    assert places[0] > 0
    assert "waits for nodes: Resources; expected at" in text
    text = shown(monkeypatch, Terminal(), PENDING, RUNNING, FINISHED)
    assert "finished" in text
    assert "\x1b[" in text


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_nothing_to_watch_is_said_once(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    for states in ([None], [RUNNING, None]):  # one ends, with --active
        text = shown(monkeypatch, kind(), *states)
        assert text.split("\r")[-1].count("nothing waits") == 1
        assert text.rstrip().removesuffix("\x1b[?25h").rstrip().endswith("nothing waits")


def test_watching_is_left_by_ctrl_c_without_a_failure(
    run: JobFolder, slurm: FakeSlurm, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says("RUNNING")

    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs_text.time, "sleep", press)
    typed("jobs", run.output_dir, "--watch")


@pytest.mark.slurm
def test_stopping_on_a_cluster(on_cluster: SlurmCluster, tmp_path: Path, typed: Typed) -> None:
    mark, task = tmp_path / "told", tmp_path / "task.sh"
    task.write_text(
        f"trap 'echo told > {mark}; exit 0' USR2; touch {mark}.ready; while :; do sleep 0.1; done"
    )
    words = ["sbatch", "--parsable", "--output=/dev/null"]
    array = on_cluster.run(*words, "--array=0-1%1", "--wrap", f"srun bash {task}").strip()
    cells = [submitted(tmp_path / "cells" / f"seed={cell}", job_id=f"{array}_{cell}") for cell in (0, 1)]
    until(Path(f"{mark}.ready").exists, "the first cell")
    assert "2 runs: 1 running, 1 pending" in typed("jobs", tmp_path).out
    running, waiting = typed("jobs", "stop", tmp_path).out.splitlines()
    assert "saves at its next step" in running
    assert "was pending and is cancelled" in waiting
    until(mark.exists, "the signal")
    assert describe_run(cells[1].output_dir).state == "cancelled"
    third = submitted(tmp_path / "third", job_id=on_cluster.run(*words, "--wrap", "sleep 100").strip())
    typed("jobs", "stop", tmp_path / "third", "--now")
    until(lambda: describe_run(third.output_dir).state == "cancelled", "the cancelling", every=0.1)
