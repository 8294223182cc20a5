"""`graftvit jobs`, `logs` and `stop`, as a user types them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm import jobs, logs
from graftvit.launch.slurm.failures import Failure
from graftvit.launch.slurm.job_folder import known, registry_file, remember
from graftvit.launch.slurm.jobs_text import duration
from graftvit.launch.slurm.logs import Follower, tail
from graftvit.launch.slurm.scheduler import JobState
from support.runs.patience import until
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import submitted


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def say(monkeypatch: pytest.MonkeyPatch, *states: JobState) -> None:
    """What the scheduler says at each question, the last one for ever."""
    left = list(states)

    def answer(ids: list[str], **_: object) -> dict[str, JobState]:
        return dict.fromkeys(ids, left.pop(0) if len(left) > 1 else left[0])

    monkeypatch.setattr(jobs, "job_states", answer)


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


def test_all_remembered_runs_in_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs"]) == 0
    assert "no run of this user is listed" in capsys.readouterr().out
    for name in ("one", "two"):
        submitted(tmp_path / name)
        remember(tmp_path / name)
    remember(tmp_path)  # no run any more
    say(monkeypatch, JobState("PENDING", reason="Priority"))
    assert main(["jobs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "job", "state"]
    assert "pending (waits behind jobs of higher priority: Priority)" in lines[1]
    assert lines[-1] == "2 runs: 2 pending"


def test_one_run_at_length_and_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = submitted(tmp_path / "run")
    name = files.begin(job_id="12", restart=0, nodes=["gpu1"], world_size=2)
    files.note(name, signal="SIGUSR2 (preempted)", outcome="requeued")
    name = files.begin(job_id="12", restart=1, nodes=["gpu2"], world_size=2)
    files.note(name, outcome="failed", why="ValueError: boom")
    files.write_failure(name, Failure(1, "cause", False, "Traceback\nValueError: boom\n"))
    say(monkeypatch, JobState("FAILED", restarts=1, nodes=("gpu2",)))
    assert main(["jobs", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "state     failed: ValueError: boom" in text
    assert "attempt 2 on gpu2, after: SIGUSR2 (preempted)" in text
    assert "last words of rank 1:\n  Traceback\n  ValueError: boom\n" in text
    assert f"`graftvit resume {tmp_path}/run` resumes" in text
    assert main(["jobs", "--json", str(tmp_path / "run")]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["error_rank"], found["restarts"][0]["attempt"]) == ("failed", 1, 2)


@pytest.mark.parametrize("command", ["jobs", "logs", "stop"])
def test_a_folder_that_is_no_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "was never submitted" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(value) for value in (None, 0.4, 3723, 90061)] == ["", "0:00:00", "1:02:03", "1-01:01:01"]


def test_the_end_of_a_long_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "_CHUNK", 7)
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(50)) + "cut")
    assert tail(path, 3) == "line 48\nline 49\ncut"
    assert tail(path, 0) == ""
    assert tail(tmp_path / "none", 3) == ""


def test_following_survives_truncation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = Follower(path)
    assert follower.new() == ""
    path.write_text("a long first line\nhal")
    assert follower.new() == "a long first line\n"
    with path.open("a") as file:
        file.write("f\n")
    assert follower.new() == "half\n"
    path.write_text("new\n")
    assert follower.new() == "new\n"


def test_logs_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path / "run")
    assert main(["logs", str(tmp_path / "run")]) == 0
    assert "there is no log yet" in capsys.readouterr().err
    (tmp_path / "run" / "logs" / "12_0_log.err").write_text("old\nerr 0\n")
    (tmp_path / "run" / "logs" / "12_1_log.out").write_text("out 1\n")
    assert main(["logs", str(tmp_path / "run"), "--lines", "1"]) == 0
    text = capsys.readouterr().out
    assert "err 0" in text
    assert "old" not in text
    assert "out 1" not in text
    assert main(["logs", str(tmp_path / "run"), "--rank", "1"]) == 0
    assert "out 1" in capsys.readouterr().out
    assert main(["logs", str(tmp_path / "run"), "--rank", "7"]) == 2
    assert "ranks with logs are 0 to 1" in capsys.readouterr().err


def test_following_ends_with_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "POLL", 0.01)
    monkeypatch.setattr(logs, "ASK", 0.2)
    files = submitted(tmp_path / "run")
    path = tmp_path / "run" / "logs" / "12_0_log.out"
    say(monkeypatch, JobState("PENDING"), JobState("RUNNING"), JobState("COMPLETED"))

    def work() -> None:
        time.sleep(0.1)
        path.write_text("begun\n")
        time.sleep(0.2)
        files.begin(job_id="12", restart=0, nodes=[], world_size=1, outcome="finished")
        path.write_text("begun\nthe end")

    thread = threading.Thread(target=work)
    thread.start()
    assert main(["logs", str(tmp_path / "run"), "--follow"]) == 0
    thread.join()
    written = capsys.readouterr()
    assert written.out.endswith("begun\nthe end\n")
    assert "the run is finished" in written.err


def test_stopping_what_has_ended_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path / "run")
    say(monkeypatch, JobState("TIMEOUT"))
    assert main(["stop", str(tmp_path / "run")]) == 0
    assert "has no waiting or running job: it is timed out" in capsys.readouterr().out


def test_a_local_run_is_stopped_through_its_controller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import signal, sys; print(flush=True); print(signal.sigwait([15, 2]))"
    blocked = "import signal, sys; signal.pthread_sigmask(0, [15, 2]);"
    for words, number in (([], signal.SIGTERM), (["--now"], signal.SIGINT)):
        folder = tmp_path / f"run{number}"
        controller = subprocess.Popen(
            [sys.executable, "-c", blocked + program, "submitit.local._local", str(folder / "logs")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert controller.stdout is not None
        controller.stdout.readline()
        files = submitted(folder, cluster="local", job_id=str(controller.pid))
        assert main(["stop", str(folder), *words]) == 0
        assert f"`graftvit resume {folder}` resumes" in capsys.readouterr().out
        assert files.asked_to_stop(str(controller.pid))
        assert int(controller.communicate(timeout=10)[0]) == number


@pytest.mark.slurm
def test_stopping_on_a_cluster(
    cluster: SlurmCluster,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    mark = tmp_path / "told"
    task = tmp_path / "task.sh"
    task.write_text(
        f"trap 'echo told > {mark}; exit 0' USR2; touch {mark}.ready; while :; do sleep 0.1; done"
    )
    words = ["sbatch", "--parsable", "--output=/dev/null"]
    array = cluster.run(*words, "--array=0-1%1", "--wrap", f"srun bash {task}").strip()
    cells = [submitted(tmp_path / "cells" / f"seed={cell}", job_id=f"{array}_{cell}") for cell in (0, 1)]
    until(Path(f"{mark}.ready").exists, "the first cell")
    assert main(["jobs", str(tmp_path)]) == 0
    assert "2 runs: 1 running, 1 pending" in capsys.readouterr().out
    assert main(["stop", str(tmp_path)]) == 0
    running, waiting = capsys.readouterr().out.splitlines()
    assert "saves at its next step" in running
    assert "was pending and is cancelled" in waiting
    until(mark.exists, "the signal")
    assert jobs.describe_run(cells[1].output_dir).state == "cancelled"
    third = submitted(tmp_path / "third", job_id=cluster.run(*words, "--wrap", "sleep 100").strip())
    assert main(["stop", str(tmp_path / "third"), "--now"]) == 0
    until(lambda: jobs.describe_run(third.output_dir).state == "cancelled", "the cancelling", every=0.1)
