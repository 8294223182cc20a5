"""Sweeps, comparisons and searches as arrays of jobs."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
from graftvit.launch.cli import dispatch
from graftvit.launch.slurm.folder import Attempt, JobFolder
from graftvit.models.errors import ConfigError
from support.runs.compare_runs import cell, write_config_with_teacher
from support.runs.engine_runs import make_teacher
from support.slurm.cluster_runs import ALONE, cluster_run, graftvit, held, wait_for_the_end
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LAYERS, SEEDS = ("all", "first-1", "last-1"), range(2)
SWEEP = ["--sweep", "transfer.layers=all,first:1,last:1", "--sweep", "seed=0..1"]
ARRAY = [*ALONE, "--array_parallelism", "4"]
BROKEN = {"layers=all,seed=1": "checkpoints/incoming", "layers=last-1,seed=0": "checkpoints/best.safetensors"}
"""The cell that fails at its first save, and the one that fails after some; and what they cannot write."""


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
    """Each cell has two epochs of four steps."""
    sizes = {"data": {"train_samples": 64, "batch_size": 16}, "optim": {"epochs": 2}}
    run = cluster_run(cluster, tmp_path, "sweep", **sizes, engine={"save_every": 2, "eval_every": 1})
    folder, cells = run.folder, run.folder / "cells"
    file_in_the_way, folder_in_the_way = block(cells)
    monkeypatch.chdir(tmp_path)
    for name, value in run.environment.items():
        monkeypatch.setenv(name, value)

    with held(cluster) as until_resuming_was_refused:
        words = ("submit", run.recipe(), *SWEEP, *ARRAY, *until_resuming_was_refused)
        assert "6 cells" in run.graftvit(*words)
        assert f"{folder} is job" in refused("jobs", "resume", str(folder))
    assert len(list(cells.iterdir())) == 6
    jobs = {path.name: JobFolder(path).job().job_id for path in cells.iterdir()}  # type: ignore[union-attr]
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1
    wait_for_the_end(cluster)
    failed = {name for name, attempt in last_attempts(cells).items() if attempt.outcome == "failed"}
    assert failed == set(BROKEN), {name: attempt.why for name, attempt in last_attempts(cells).items()}
    for name, path in BROKEN.items():
        assert f"{name}/{path}" in last_attempts(cells)[name].why

    file_in_the_way.unlink()
    folder_in_the_way.rmdir()
    with held(cluster) as until_resuming_was_refused:
        assert "2 cells" in run.graftvit("jobs", "resume", str(folder), *until_resuming_was_refused)
        assert f"{folder} is job" in refused("jobs", "resume", str(folder))
    wait_for_the_end(cluster)
    assert all(attempt.outcome == "finished" for attempt in last_attempts(cells).values())
    for name, job in jobs.items():
        submissions = JobFolder(cells / name).jobs()
        assert submissions[0].job_id == job
        assert len(submissions) == 1 + (name in BROKEN)
        assert len(JobFolder(cells / name).attempts()) == 1 + (name in BROKEN)
    assert "has finished" in refused("jobs", "resume", str(folder))

    assert dispatch(["jobs", "summary", str(folder)]) == 0
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [(row["done"], row["asked"], row["not_done"]) for row in rows] == [("2", "2", "")] * 3
    for row, layers in zip(rows, LAYERS, strict=True):
        for name in ("test_top1", "test_ema_top1", "train_loss"):
            measured = float(row[f"{name}_mean"]), float(row[f"{name}_std"])
            assert measured == pytest.approx(expected(cells, layers, name)), name
    assert len({row["train_loss_mean"] for row in rows}) == 3


CELLS = ["teacher-8", "uniform-8", "linear-8"]


def outcomes(folder: Path) -> list[str | None]:
    return [attempt.outcome for attempt in JobFolder(folder).attempts()]


def test_the_teacher_comes_first_and_the_cells_wait_for_it(cluster: SlurmCluster, tmp_path: Path) -> None:
    recipe, out = write_config_with_teacher(tmp_path, "teacher.yaml"), tmp_path / "out"
    in_the_way = out / "teacher" / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()

    said = graftvit(cluster, tmp_path, "submit", str(recipe), *ALONE)
    assert "(3 cells), after job" in said
    wait_for_the_end(cluster)
    assert outcomes(out / "teacher") == ["failed"]
    assert all(outcomes(out / "cells" / name) == [] for name in CELLS)  # cancelled with their teacher

    in_the_way.unlink()
    said = graftvit(cluster, tmp_path, "jobs", "resume", str(out))
    assert "(3 cells), after job" in said
    wait_for_the_end(cluster)
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


def test_an_array_ends_in_the_archive_of_one_process(cluster: SlurmCluster, tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    search = "programs search teacher --dataset digits --images 4 --population 6 --generations 3 --workers 1"
    graftvit(cluster, tmp_path, *search.split(), "--output_dir", "alone")
    words = (*search.split(), "--output_dir", "shared", "--shares", "3")
    assert "3 cells" in graftvit(cluster, tmp_path, "submit", *words, *ALONE)
    wait_for_the_end(cluster)
    folder = tmp_path / "runs" / "search-teacher"
    assert [outcomes(folder / "cells" / f"share-{share}") for share in (1, 2, 3)] == [["finished"]] * 3
    shared, alone = (tmp_path / name / "archive.json" for name in ("shared", "alone"))
    assert shared.read_bytes() == alone.read_bytes()
    shown = json.loads(graftvit(cluster, tmp_path, "jobs", str(folder), "--json"))
    assert [run["state"] for run in shown] == ["finished"] * 3
    assert {run["output"] for run in shown} == {str(tmp_path / "shared")}
