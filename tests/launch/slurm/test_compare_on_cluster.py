"""A comparison on a cluster: the teacher's job, then an array with a cell a job, then the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from graftvit.launch.cli import dispatch
from graftvit.launch.slurm.job_folder import JobFolder
from support.runs.compare_runs import cell, write_config
from support.runs.patience import until
from support.slurm.cluster_runs import graftvit
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
CELLS = ["teacher-8", "uniform-8", "linear-8"]
ONE = ["--nodes", "1", "--tasks_per_node", "1"]


def write_recipes(folder: Path) -> Path:
    """A comparison that makes its teacher first, in one epoch."""
    path = write_config(folder, {"linear": "*: linear"})
    whole = yaml.safe_load(path.read_text())
    teacher = {"mode": "scratch", "output_dir": str(folder / "unused")}
    teacher |= {key: whole[key] for key in ("data", "engine")}
    teacher["student"] = {key: value for key, value in whole["student"].items() if key != "init"}
    teacher["optim"] = {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    del whole["teacher"]
    whole["optim"]["epochs"] = 1
    whole["compare"]["teacher_recipe"] = "teacher.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def outcomes(folder: Path) -> list[str | None]:
    return [attempt.outcome for attempt in JobFolder(folder).attempts()]


def test_the_teacher_comes_first_and_the_cells_wait_for_it(cluster: SlurmCluster, tmp_path: Path) -> None:
    recipe, out = write_recipes(tmp_path), tmp_path / "out"
    in_the_way = out / "teacher" / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()

    def wait() -> None:
        until(lambda: not cluster.run("squeue", "-h").strip(), "the end of all jobs", every=0.5)

    said = graftvit(cluster, tmp_path, "submit", str(recipe), *ONE)
    assert "3 cells" in said
    assert "for the teacher" in said
    wait()
    assert outcomes(out / "teacher") == ["failed"]
    assert all(outcomes(out / "cells" / name) == [] for name in CELLS)  # cancelled with their teacher

    in_the_way.unlink()
    said = graftvit(cluster, tmp_path, "resume", str(out))
    assert "3 cells" in said
    assert "for the teacher" in said
    wait()
    assert outcomes(out / "teacher") == ["failed", "finished"]
    assert all(outcomes(out / "cells" / name) == ["finished"] for name in CELLS)
    teacher = JobFolder(out / "teacher").attempts()[-1]
    for name in CELLS:
        (attempt,) = JobFolder(out / "cells" / name).attempts()
        assert attempt.started > (teacher.ended or attempt.started)
        assert cell(tmp_path, name)["error"] is None

    assert dispatch(["compare", str(out / "jobs" / "config.yaml"), "--report"]) == 0
    table = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in table] == ["teacher", "uniform", "linear"]
    assert all(row["error"] is None for row in table)
