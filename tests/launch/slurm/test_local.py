"""The same submission without SLURM: in the background of this machine, and in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.slurm.folder import JobFolder
from graftvit.launch.slurm.lock import is_ordered
from support.runs import commands
from support.runs.engine_runs import config, differences, make_teacher
from support.runs.patience import until

pytestmark = pytest.mark.slow
HERE = ["--nodes", "1", "--gpus_per_node", "0"]


def recipe(root: Path, name: str, epochs: int = 2) -> Path:
    if not (root / "teacher").exists():
        make_teacher(root / "teacher")
    run = config(root / name, root / "teacher", optim={"epochs": epochs}, engine={"eval_every": epochs})
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return path


def user() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def graftvit(root: Path, *words: str, code: int = 0) -> str:
    done = commands.run(words, user(), root)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def outcomes(folder: Path) -> list[str | None]:
    return [attempt.outcome for attempt in JobFolder(folder).attempts()]


def lines(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_signal_in_the_background_starts_the_run_again_where_it_was(tmp_path: Path) -> None:
    graftvit(tmp_path, "train", str(recipe(tmp_path, "whole", 30)))
    graftvit(tmp_path, "submit", str(recipe(tmp_path, "cut", 30)), "--cluster", "local", *HERE)
    folder = tmp_path / "cut"
    job = JobFolder(folder).job()
    assert job is not None
    until(lambda: lines(folder) > 20, "training")
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)
    until(lambda: outcomes(folder) == ["requeued", "finished"], "the end")
    assert differences(tmp_path / "whole", folder) == []
    assert "torch" not in (folder / "jobs" / "logs" / "controller.log").read_text()


def shown(root: Path, folder: Path) -> dict[str, Any]:
    (status,) = json.loads(graftvit(root, "jobs", str(folder), "--json"))
    return dict(status)


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_a_second_submission_is_refused_while_the_first_runs_which_can_be_stopped(
    cluster: str, tmp_path: Path
) -> None:
    words = ("submit", str(recipe(tmp_path, "run", 500)), "--unchecked", *HERE, "--cluster")
    folder = tmp_path / "run"
    process = commands.Command((*words, cluster), user(), tmp_path)
    until(lambda: lines(folder) > 5, "training")
    job = shown(tmp_path, folder)["job_id"]
    for again in ((*words, "local"), (*words, "debug"), ("jobs", "resume", str(folder))):
        assert f"{folder} is job {job} already" in graftvit(tmp_path, *again, code=2)
    assert shown(tmp_path, folder)["state"] == "running"
    now = ("--now",) if cluster == "local" else ()
    assert f"job {job} of {folder}" in graftvit(tmp_path, "jobs", "stop", str(folder), *now)
    process.communicate()
    until(lambda: shown(tmp_path, folder)["state"] != "running", "the end", every=0.5)
    assert now or (outcomes(folder), shown(tmp_path, folder)["state"]) == (["stopped"], "stopped")


def test_a_local_job_whose_submission_was_killed_is_known_and_runs(tmp_path: Path) -> None:
    """Killed before it could write the number down."""
    folder = tmp_path / "run"
    words = ["submit", str(recipe(tmp_path, "run", 500)), "--cluster", "local", "--unchecked", *HERE]
    program = (
        "import os, signal, sys\n"
        "from graftvit.launch.slurm import submit\n"
        "submit.write_number = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from graftvit.launch.cli import main\n"
        f"main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], env=user(), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: lines(folder) > 5, "training")
    assert shown(tmp_path, folder)["state"] == "running"
    assert "is job" in graftvit(tmp_path, "jobs", "resume", str(folder), code=2)
    graftvit(tmp_path, "jobs", "stop", str(folder))
    until(lambda: outcomes(folder) == ["stopped"], "the stop")


def test_an_order_is_known_while_its_process_lives(tmp_path: Path) -> None:
    script = tmp_path / "a b" / "submit.sh"
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(script)])
    until(lambda: is_ordered(script), "the start")
    assert not is_ordered(tmp_path / "submit.sh")
    process.kill()
    process.wait()
    assert not is_ordered(script)
