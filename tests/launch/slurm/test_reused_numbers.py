"""A job's number comes again where Slurm's counter was reset, or where two clusters share one home."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import jobs, lookup
from graftvit.launch.slurm.batch import job_name
from graftvit.launch.slurm.jobs import describe_run
from graftvit.launch.slurm.scheduler import JobState, parse_accounting, parse_queue
from graftvit.launch.slurm.stopping import find_unfinished
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import attempted, submitted

ROW = "12|RUNNING|n1|None|0|0|2026-11-21T12:13:56|2026-11-21T12:33:56|10:00|{name}|{script}|"


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
def test_a_job_is_known_by_its_name_or_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, launch: str, own: bool
) -> None:
    submitted(tmp_path, name="graftvit-run-0", launch=str(tmp_path / "launch-0"))
    script = str(tmp_path / launch / "submit.sh") if launch else ""
    monkeypatch.setattr(lookup, "queued_jobs", list)
    monkeypatch.setattr(
        jobs, "job_states", lambda *_, **__: parse_queue(ROW.format(name=name, script=script))
    )
    assert describe_run(tmp_path).active == own


def test_older_records_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(tmp_path)
    monkeypatch.setattr(lookup, "queued_jobs", list)
    monkeypatch.setattr(jobs, "job_states", lambda *_, **__: {"12": JobState("RUNNING", name="other")})
    assert describe_run(tmp_path).active


def test_a_script_may_have_a_bar_in_its_path() -> None:
    assert parse_queue(ROW.format(name="x", script="/a|b/submit.sh"))["12"].script == Path("/a|b/submit.sh")


def test_the_accounting_keeps_jobs_of_one_number_apart() -> None:
    lines = ["JobID|State|Restarts|JobName", "7|NODE_FAIL||old", "7|NODE_FAIL||new", "7|COMPLETED||new"]
    job = parse_accounting("\n".join(lines))["7"]
    assert (job.name, job.history) == ("new", ("NODE_FAIL",))


@pytest.mark.slurm
def test_the_job_of_somebody_else_is_never_shown_waited_for_or_cancelled(
    cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    wrapped = ("sbatch", "--parsable", "--output=/dev/null", "--job-name=other", "--wrap", "sleep 100")
    job = cluster.run(*wrapped).strip()
    submitted(tmp_path, job_id=job, name=job_name(tmp_path))
    attempted(tmp_path, "stopped")
    assert describe_run(tmp_path).state == "unknown"
    for words in ([], ["--now"]):
        assert main(["stop", str(tmp_path), *words]) == 0
        assert "has no waiting or running job" in capsys.readouterr().out
    assert list(find_unfinished(tmp_path).submissions) == [tmp_path]
    assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--states=PENDING,RUNNING").strip()
    cluster.run("scancel", job)
