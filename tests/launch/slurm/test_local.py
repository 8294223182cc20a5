"""The same submission without SLURM: in the background of this machine, and in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engine_runs import config, differences, make_teacher
from graftvit.launch.slurm.files import JobFolder
from patience import until

pytestmark = pytest.mark.slow
HERE = ["--nodes", "1", "--gpus_per_node", "0"]


def recipe(root: Path, name: str, epochs: int = 2) -> Path:
    if not (root / "teacher").exists():
        make_teacher(root / "teacher")
    run = config(root / name, root / "teacher", optim={"epochs": epochs}, engine={"eval_every": epochs})
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return path


def graftvit(root: Path, *words: str, code: int = 0) -> str:
    own = {
        "XDG_CONFIG_HOME": str(root / "config"),
        "XDG_STATE_HOME": str(root / "state"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "graftvit.launch", *words]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=120)
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
    submission = JobFolder(folder).submission()
    assert submission is not None
    until(lambda: lines(folder) > 20, "training")
    children = Path(f"/proc/{submission.job_id}/task/{submission.job_id}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)
    until(lambda: outcomes(folder) == ["requeued", "finished"], "the end")
    assert differences(tmp_path / "whole", folder) == []
    assert "torch" not in (folder / "jobs" / "logs" / "controller.log").read_text()


def test_debug_runs_in_this_process_and_its_failure_is_told(tmp_path: Path) -> None:
    graftvit(tmp_path, "submit", str(recipe(tmp_path, "run")), "--cluster", "debug", *HERE)
    assert outcomes(tmp_path / "run") == ["finished"]
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_several_tasks_in_one_process_are_refused(tmp_path: Path) -> None:
    told = graftvit(
        tmp_path, "submit", str(recipe(tmp_path, "run")), "--cluster", "debug", "--gpus_per_node", "2", code=2
    )
    assert "--cluster debug is this process alone" in told
    told = graftvit(
        tmp_path, "submit", str(recipe(tmp_path, "run")), "--cluster", "local", "--nodes", "2", code=2
    )
    assert "--nodes 2: --cluster local is this machine alone" in told
    assert not (tmp_path / "run").exists()
