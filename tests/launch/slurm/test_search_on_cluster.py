"""A search as an array of jobs: each evaluates its share, and all end in the archive of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from graftvit.launch.slurm.job_folder import JobFolder
from support.runs.engine_runs import make_teacher
from support.runs.patience import until
from support.slurm.cluster_runs import graftvit
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SHARES = 3
WORDS = ("search", "teacher", "--dataset", "digits", "--images", "4", "--population", "6")
WORDS += ("--generations", "3", "--workers", "1")


def test_an_array_ends_in_the_archive_of_one_process(cluster: SlurmCluster, tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    graftvit(cluster, tmp_path, *WORDS, "--out", "alone")
    refused = ("evaluate", "teacher", "--dataset", "digits", "--shares", "2")
    assert "only `graftvit submit search` can be divided" in graftvit(
        cluster, tmp_path, "submit", *refused, "--tasks_per_node", "1", code=2
    )
    said = graftvit(
        cluster, tmp_path, "submit", *WORDS, "--out", "shared", "--shares", str(SHARES),
        "--nodes", "1", "--tasks_per_node", "1",
    )  # fmt: skip
    assert "3 cells" in said
    until(lambda: not cluster.run("squeue", "-h").strip(), "the end of all jobs", every=0.5)
    folder = tmp_path / "runs" / "search-teacher"
    for share in range(1, SHARES + 1):
        (attempt,) = JobFolder(folder / "cells" / f"share-{share}").attempts()
        assert attempt.outcome == "finished"
    assert (tmp_path / "shared" / "archive.json").read_bytes() == (
        tmp_path / "alone" / "archive.json"
    ).read_bytes()
    shown = json.loads(graftvit(cluster, tmp_path, "jobs", str(folder), "--json"))
    assert [run["state"] for run in shown] == ["finished"] * SHARES
    assert {run["output"] for run in shown} == {str(tmp_path / "shared")}
