"""A sweep of six cells as one array: two of them fail, are submitted again alone, and the summary is right."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from graftvit.launch.cli import dispatch
from graftvit.launch.slurm.job_folder import Attempt, JobFolder
from graftvit.models.errors import ConfigError
from support.runs.engine_runs import config, make_teacher
from support.runs.patience import until
from support.slurm.cluster_runs import graftvit, held, user_environment
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LAYERS, SEEDS = ("all", "first-1", "last-1"), range(2)
SWEEP = ["--sweep", "transfer.layers=all,first:1,last:1", "--sweep", "seed=0..1"]
ARRAY = ["--nodes", "1", "--tasks_per_node", "1", "--array_parallelism", "4"]
BROKEN = {"layers=all,seed=1": "checkpoints/incoming", "layers=last-1,seed=0": "checkpoints/best.safetensors"}
"""The cell that fails at its first save, and the one that fails after some; and what they cannot write."""


def write_recipe(root: Path) -> Path:
    """Two epochs of four steps."""
    run = config(
        root / "sweep",
        make_teacher(root / "teacher"),
        data={"train_samples": 64},
        engine={"evaluate_teacher": False, "save_every": 2},
    )
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return path


def block(cells: Path) -> tuple[Path, Path]:
    """A file where a cell needs a folder, and a folder where another needs a file."""
    first, second = BROKEN
    file, folder = cells / first / "checkpoints", cells / second / "checkpoints" / "best.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    folder.mkdir(parents=True)
    return file, folder


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        dispatch(list(words))
    return str(caught.value)


def last_attempts(cells: Path) -> dict[str, Attempt]:
    found = {path.name: JobFolder(path).attempts() for path in cells.iterdir()}
    return {name: attempts[-1] for name, attempts in found.items() if attempts}


def queue_is_empty(cluster: SlurmCluster) -> Callable[[], bool]:
    return lambda: not cluster.run("squeue", "-h").strip()


def expected(cells: Path, layers: str, name: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of what the last epoch measured, off the logs."""
    values = []
    for seed in SEEDS:
        lines = (cells / f"layers={layers},seed={seed}" / "log.jsonl").read_text().splitlines()
        values.append([json.loads(line)[name] for line in lines if name in line][-1])
    return statistics.mean(values), statistics.stdev(values)


def test_two_of_six_cells_fail_and_are_resubmitted_alone(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = write_recipe(tmp_path), tmp_path / "sweep"
    cells = folder / "cells"
    file_in_the_way, folder_in_the_way = block(cells)
    monkeypatch.chdir(tmp_path)
    for name, value in user_environment(cluster, tmp_path).items():
        monkeypatch.setenv(name, value)

    with held(cluster) as until_resuming_was_refused:
        words = ("submit", str(recipe), *SWEEP, *ARRAY, *until_resuming_was_refused)
        assert "6 cells" in graftvit(cluster, tmp_path, *words)
        assert f"{folder} is job" in refused("resume", str(folder))
    assert len(list(cells.iterdir())) == 6
    jobs = {path.name: JobFolder(path).submission().job_id for path in cells.iterdir()}  # type: ignore[union-attr]
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1
    until(queue_is_empty(cluster), "the end of the array", every=0.5)
    failed = {name for name, attempt in last_attempts(cells).items() if attempt.outcome == "failed"}
    assert failed == set(BROKEN), {name: attempt.why for name, attempt in last_attempts(cells).items()}
    for name, path in BROKEN.items():
        assert f"{name}/{path}" in last_attempts(cells)[name].why
    other = refused("submit", str(recipe), "--sweep", "seed=0..1", *ARRAY)
    assert "holds another sweep (--sweep 'transfer.layers=all,first:1,last:1' --sweep 'seed=0,1')" in other

    file_in_the_way.unlink()
    folder_in_the_way.rmdir()
    with held(cluster) as until_resuming_was_refused:
        words = ("resume", str(folder), *until_resuming_was_refused)
        assert "2 cells" in graftvit(cluster, tmp_path, *words)
        assert f"{folder} is job" in refused("resume", str(folder))
    until(queue_is_empty(cluster), "the end of the two", every=0.5)
    assert all(attempt.outcome == "finished" for attempt in last_attempts(cells).values())
    for name, job in jobs.items():
        submissions = JobFolder(cells / name).submissions()
        assert submissions[0].job_id == job
        assert len(submissions) == 1 + (name in BROKEN)
        assert len(JobFolder(cells / name).attempts()) == 1 + (name in BROKEN)
    assert "has finished" in refused("resume", str(folder))

    assert dispatch(["summary", str(folder)]) == 0
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [(row["done"], row["asked"], row["not_done"]) for row in rows] == [("2", "2", "")] * 3
    for row, layers in zip(rows, LAYERS, strict=True):
        for name in ("test_top1", "test_ema_top1", "train_loss"):
            measured = float(row[f"{name}_mean"]), float(row[f"{name}_std"])
            assert measured == pytest.approx(expected(cells, layers, name)), name
    assert len({row["train_loss_mean"] for row in rows}) == 3
