"""Two processes of one run, however they are started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import yaml
from graftvit.checkpoints.state import read_state
from support.runs.engine_runs import config, records

INSIDE = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "OMPI", "PMI")


def clean(**more: str) -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if not name.startswith(INSIDE)}
    return {**left, "OMP_NUM_THREADS": "1", **more}


def recipe(tmp_path: Path) -> Path:
    """Four steps of two ranks, in `tmp_path/run`."""
    sizes, length = {"train_samples": 64, "batch_size": 16}, {"epochs": 2, "warmup_epochs": 0}
    run = config(tmp_path / "run", data=sizes, optim=length, engine={"log_interval": 1})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return path


def run_all(commands: list[list[str]], environments: list[Mapping[str, str]], cwd: Path) -> None:
    """Run the commands side by side; they share one run, and nobody else writes into its log."""
    started = [
        subprocess.Popen(command, env=dict(environment), cwd=cwd, stderr=subprocess.PIPE, text=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        said = [one.communicate(timeout=600)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * len(started), said
    assert read_state(cwd / "run" / "checkpoints" / "last.safetensors").meta["world_size"] == 2
    steps = [record["step"] for record in records(cwd / "run") if "train_loss" in record]
    assert steps == [1, 2, 2, 3, 4, 4]  # two steps an epoch, and the epoch's own record


TRAIN = ("-m", "graftvit.launch", "train")
