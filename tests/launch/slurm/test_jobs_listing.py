"""Which runs `graftvit jobs` lists, under which names, and what it says where Slurm does not answer."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import jobs
from graftvit.launch.slurm import jobs_text as watching
from graftvit.launch.slurm.job_folder import remember
from graftvit.launch.slurm.jobs import describe_run, judge_jobs
from graftvit.launch.slurm.scheduler import JobState, NoAnswerError
from graftvit.models.errors import GraftError
from support.slurm.slurm_folders import submitted


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def say(monkeypatch: pytest.MonkeyPatch, **states: str) -> None:
    """What the scheduler says of jobs `j12` and so on."""
    found = {job.removeprefix("j"): JobState(state) for job, state in states.items()}
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: {job: found.get(job, JobState()) for job in ids})


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def states(ids: object, **_: object) -> dict[str, JobState]:
        raise NoAnswerError("Slurm does not answer: asked 3 times in 29 seconds")

    monkeypatch.setattr(jobs, "job_states", states)


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["jobs", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_names_of_cells_are_paths_that_a_shell_and_other_commands_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path)
    cells = [f"my sweep/cells/lr=1e-3,seed={seed}" for seed in (0, 1)]
    for cell in cells:
        submitted(tmp_path / cell)
    say(monkeypatch, j12="RUNNING")
    for given in ("my sweep", str(tmp_path / "my sweep")):
        lines = listed(capsys, given)
        names = [shlex.split(line)[0] for line in lines[1:3]]
        assert [Path(name).absolute() for name in names] == [tmp_path / cell for cell in cells]
        assert main(["logs", names[0]]) == 0
        assert f"graftvit jobs '{tmp_path}/{cells[0]}'" in capsys.readouterr().err


def test_active_runs_and_the_last_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("old", "mid", "new")):
        submitted(tmp_path / name, job_id=str(20 + number), submitted=float(number))
        remember(tmp_path / name)
    say(monkeypatch, j20="RUNNING", j21="FAILED", j22="PENDING")

    def names(*words: str) -> list[str]:
        lines = [line for line in listed(capsys, *words) if line.startswith(str(tmp_path))]
        return [Path(line.split()[0]).name for line in lines]

    assert names("--active") == ["old", "new"]
    assert names("--last", "2") == ["mid", "new"]
    assert names("--active", "--last", "1") == ["new"]
    say(monkeypatch)
    assert listed(capsys, "--active") == ["no run waits or runs"]
    assert main(["jobs", "--last", "0"]) == 2
    assert main(["jobs", "--watch", "--json"]) == 2


def test_watching_is_left_by_ctrl_c_without_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted(tmp_path / "run")
    say(monkeypatch, j12="RUNNING")

    def press(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", press)
    assert main(["jobs", str(tmp_path / "run"), "--watch"]) == 0


def test_without_an_answer_the_files_are_told_and_that_they_are_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = submitted(tmp_path / "run")
    files.begin(job_id="12", restart=0, nodes=["n1"], world_size=1)
    silence(monkeypatch)
    assert main(["jobs", str(tmp_path / "run")]) == 0
    written = capsys.readouterr()
    assert "unknown: Slurm does not answer; attempt 1 has not said how it ended" in written.out
    assert written.err.count("Slurm does not answer: asked 3 times in 29 seconds") == 1
    assert not describe_run(tmp_path / "run").over
    with pytest.raises(GraftError, match="Slurm does not answer"):
        judge_jobs([tmp_path / "run"], strict=True)


def test_an_earlier_job_that_lives_is_the_one_that_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("10", "11", "12"):
        submitted(tmp_path / "run", job_id=job)
    say(monkeypatch, j10="RUNNING", j11="PENDING", j12="FAILED")
    status = describe_run(tmp_path / "run")
    assert (status.job_id, status.state, status.others) == ("11", "pending", ["10"])
    assert "job 10 of this folder" in "\n".join(listed(capsys, str(tmp_path / "run")))
    say(monkeypatch, j10="RUNNING", j11="PENDING", j12="RUNNING")
    assert describe_run(tmp_path / "run").others == ["10", "11"]
    assert [one.active for one in judge_jobs([tmp_path / "run"])[tmp_path / "run"]] == [True] * 3


def test_the_logs_are_those_of_the_job_that_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("11", "12"):
        submitted(tmp_path / "run", job_id=job)
        (tmp_path / "run" / "logs" / f"{job}_0_log.out").write_text(f"words of {job}\n")
    say(monkeypatch, j11="RUNNING", j12="FAILED")
    assert main(["logs", str(tmp_path / "run")]) == 0
    assert "words of 11" in capsys.readouterr().out
    say(monkeypatch, j11="FAILED", j12="FAILED")
    assert main(["logs", str(tmp_path / "run")]) == 0
    assert "words of 12" in capsys.readouterr().out


def test_a_private_job_of_another_user_is_not_said_to_be_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = submitted(tmp_path / "run")
    files.begin(job_id="12", restart=0, nodes=["n1"], world_size=1)
    say(monkeypatch)
    monkeypatch.setattr(jobs.os, "getuid", lambda: files.folder.stat().st_uid + 1)
    status = describe_run(tmp_path / "run")
    assert (status.state, status.why.partition(";")[0]) == (
        "unknown",
        "Slurm shows nothing of this job of another user",
    )
