"""What is said of a run, from hand-written files and what the scheduler says of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from graftvit.launch.slurm import jobs
from graftvit.launch.slurm.failures import Failure
from graftvit.launch.slurm.job_folder import JobFolder
from graftvit.launch.slurm.jobs import describe_run, read_progress, run_folders
from graftvit.launch.slurm.lookup import is_alive
from graftvit.launch.slurm.scheduler import JobState
from graftvit.models.errors import ConfigError, GraftError
from support.slurm.slurm_folders import submitted


def attempt(files: JobFolder, restart: int = 0, job_id: str = "12", **event: Any) -> str:
    name = files.begin(job_id=job_id, restart=restart, nodes=["gpu1"], world_size=2)
    if event:
        files.note(name, **event)
    return name


def say(monkeypatch: pytest.MonkeyPatch, job: JobState | Exception) -> None:
    def states(ids: list[str], **_: object) -> dict[str, JobState]:
        if isinstance(job, Exception):
            raise job
        return dict.fromkeys(ids, job)

    monkeypatch.setattr(jobs, "job_states", states)


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


@pytest.mark.parametrize(("job", "event", "state", "why"), CASES)
def test_states(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    job: JobState | Exception,
    event: dict[str, Any] | None,
    state: str,
    why: str,
) -> None:
    files = submitted(tmp_path / "run")
    if event is not None:
        attempt(files, **event)
    say(monkeypatch, job)
    status = describe_run(tmp_path / "run")
    assert (status.state, status.why) == (state, why)
    assert status.active == (state in ("pending", "requeued", "running", "stopping"))


def test_what_an_earlier_job_said_is_not_said_of_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = submitted(tmp_path / "run", job_id="13")
    attempt(files, outcome="finished")
    say(monkeypatch, GONE)
    assert describe_run(tmp_path / "run").state == "unknown"


def test_each_restart_has_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = submitted(tmp_path / "run")
    attempt(files, **PREEMPTED)
    attempt(files, 1)
    attempt(files, 2, before="node failure: gpu1")
    attempt(files, 3)
    attempt(files, 4)
    say(
        monkeypatch,
        JobState("RUNNING", restarts=4, history=("PREEMPTED", "NODE_FAIL", "NODE_FAIL", "FAILED")),
    )
    reasons = [restart.why for restart in describe_run(tmp_path / "run").restarts]
    assert reasons == ["SIGUSR2 (preempted)", "node failure: gpu1", "node failure", "ended without a word"]


def test_a_restart_after_a_stop_names_the_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = submitted(tmp_path / "run")
    attempt(files, **PREEMPTED)
    attempt(files, 1, signal="SIGUSR2", outcome="stopped")
    files.stop_request("12").touch()
    submitted(tmp_path / "run", job_id="13")
    name = files.begin(job_id="13", restart=0, nodes=["gpu1"], world_size=1)
    files.note(name, signal="SIGUSR2")
    say(monkeypatch, JobState("RUNNING"))
    reasons = [restart.why for restart in describe_run(tmp_path / "run").restarts]
    assert reasons == ["SIGUSR2 (preempted)", "`graftvit stop`"]


def test_the_error_is_that_of_the_rank_that_failed_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = submitted(tmp_path / "run")
    name = attempt(files, outcome="failed", why="boom")
    files.write_failure(name, Failure(1, "consequence", True, "neighbor is gone\n"))
    files.write_failure(name, Failure(3, "cause", False, "Traceback\nValueError: boom\n"))
    os.utime(files.folder / "errors" / f"{name}-3.txt", (1, 1))
    say(monkeypatch, JobState("FAILED"))
    status = describe_run(tmp_path / "run")
    assert (status.error_rank, status.error) == (3, "Traceback\nValueError: boom\n")


def test_where_no_rank_wrote_its_error_the_log_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = submitted(tmp_path / "run")
    attempt(files)
    logs = tmp_path / "run" / "logs"
    (logs / "12_0_log.err").write_text("all is well\n")
    (logs / "12_1_log.err").write_text("Traceback\nSegmentation error\n")
    say(monkeypatch, JobState("FAILED"))
    status = describe_run(tmp_path / "run")
    assert (status.error_rank, status.error) == (1, "Traceback\nSegmentation error\n")


def test_local_runs_live_as_long_as_their_process(tmp_path: Path) -> None:
    mine = str(os.getpid())
    files = submitted(tmp_path / "run", cluster="local", job_id=mine)
    submission = files.submission()
    assert submission is not None
    assert not is_alive(submission)  # this process is no controller of submitit
    attempt(files, job_id=mine)
    assert describe_run(tmp_path / "run").why == "ended without a word"
    files.stop_path.touch()
    assert describe_run(tmp_path / "run").state == "cancelled"


def log(folder: Path, records: list[dict[str, Any]], settings: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text + '{"epoch": 9, "st')


def test_progress_and_the_time_left(tmp_path: Path) -> None:
    interval = {"seconds": 20.0, "images_per_second": 64.0}
    records: list[dict[str, Any]] = [
        {"epoch": 0, "step": 0, "teacher_top1": 90.0},
        {"epoch": 0, "step": 10, **interval},
        {"epoch": 0, "step": 10, "n_parameters": 5, "test_top1": 40.0, "test_ema_top1": 50.0, **interval},
        {"epoch": 1, "step": 20, **interval},
        {"epoch": 1, "step": 20, "n_parameters": 5, "test_top1": 41.0, "test_ema_top1": 45.0, **interval},
        {"epoch": 2, "step": 25, **interval, "seconds": 10.0},
    ]
    log(tmp_path / "run", records, "optim:\n  epochs: 10\n")
    found = read_progress(tmp_path / "run")
    assert (found.step, found.total_steps, found.epoch, found.epochs) == (25, 100, 2, 10)
    assert (found.last_top1, found.best_top1, found.images_per_second) == (45.0, 50.0, 64.0)
    assert found.seconds_left == pytest.approx(150, abs=10)


def test_a_record_that_timed_no_step_does_not_make_the_run_fast(tmp_path: Path) -> None:
    timed = {"n_parameters": 5, "seconds": 20.0, "images_per_second": 64.0}
    records = [
        {"epoch": 0, "step": 10, **timed},
        {
            "epoch": 1,
            "step": 20,
            "n_parameters": 5,
            "seconds": 0.001,
        },  # of a run that was stopped at the end of it
    ]
    log(tmp_path / "run", records, "optim:\n  epochs: 10\n")
    found = read_progress(tmp_path / "run")
    assert found.images_per_second == 64.0
    assert found.seconds_left == pytest.approx(160)


def test_progress_of_a_recipe_with_stages(tmp_path: Path) -> None:
    log(tmp_path / "2-tune", [{"epoch": 0, "step": 3, "seconds": 3.0}], "optim:\n  max_steps: 4\n")
    log(tmp_path / "1-fit", [{"epoch": 0, "step": 9}], "optim:\n  max_steps: 9\n")
    found = read_progress(tmp_path)
    assert (found.stage, found.step, found.total_steps) == ("2-tune", 3, 4)


def test_nothing_is_known_before_the_first_record(tmp_path: Path) -> None:
    assert read_progress(tmp_path).total_steps is None


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        run_folders(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="was never submitted"):
        run_folders(tmp_path)
    submitted(tmp_path / "cells" / "seed=0")
    (tmp_path / "cells" / "seed=1").mkdir()
    assert run_folders(tmp_path) == [tmp_path / "cells" / "seed=0"]


@pytest.mark.parametrize(("free", "why"), [(0, "; the file system of {} is full"), (1 << 30, "")])
def test_who_could_not_write_his_last_word_on_a_full_disk_is_told_so(
    free: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(submitted(tmp_path))
    say(monkeypatch, JobState("COMPLETED"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert describe_run(tmp_path).why == f"ended without a word{why.format(tmp_path)}"
