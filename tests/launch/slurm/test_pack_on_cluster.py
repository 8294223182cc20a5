"""Run jobs on nodes that have neither the environment nor the code, which are packed; run a stub of Apptainer."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.slurm.attempt import Task
from graftvit.launch.slurm.batch import Batch, make_packs, script
from graftvit.launch.slurm.request import Request
from graftvit.models.errors import ConfigError
from support.runs.engine_runs import config
from support.slurm.cluster_runs import ClusterRun
from support.slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def make_environment(folder: Path) -> Path:
    """An environment in which this one's packages are found, and its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({place!r})\n" for place in site.getsitepackages()]
    (packages / "others.pth").write_text("".join(lines))
    return folder / "bin" / "python"


@pytest.mark.parametrize("kind", ["tar", "squashfs"])
def test_a_job_runs_whose_nodes_do_not_have_the_environment(
    tmp_path: Path, cluster: SlurmCluster, kind: str
) -> None:
    if kind == "squashfs" and shutil.which("mksquashfs") is None:
        pytest.skip("squashfs-tools are not installed")
    run = ClusterRun(cluster, tmp_path, config(tmp_path / "run"))
    python = make_environment(tmp_path / "env")
    node = tmp_path / "node"
    node.mkdir()
    words = [
        "submit",
        run.recipe(),
        "--pack",
        kind,
        "--pack_folder",
        str(tmp_path / "packs"),
        "--sbatch",
        "hold",
    ]
    surroundings = {**os.environ, **run.environment, "TMPDIR": str(node)}
    command = [python, "-m", "graftvit.launch", *words]
    said = subprocess.run(command, env=surroundings, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    packs = [path.name for path in (tmp_path / "packs").iterdir()]
    (tmp_path / "env").rename(tmp_path / "gone")
    (code,) = (tmp_path / "run" / "jobs").glob("code-*")
    code.rename(tmp_path / "code")
    cluster.run("scontrol", "release", said.stdout.split()[2])
    (attempt,) = run.finish()
    assert attempt.outcome == "finished"
    unpacked = [path.name for path in node.glob("graftvit-*/[!.]*")]
    for names in (packs, unpacked):
        assert sorted(name.partition("-")[0] for name in names) == ["base", "code", "env"]


def test_a_pack_is_made_once_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env, code, packs = tmp_path / "env", tmp_path / "code-0", tmp_path / "packs"
    for folder in (env, code):
        folder.mkdir()
        (folder / "a.py").write_text("1")
    monkeypatch.setattr(sys, "prefix", str(env))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    first = make_packs(code, packs, "tar")
    assert [path.name.partition("-")[0] for path in first] == ["env", "code"]
    times = [path.stat().st_mtime_ns for path in first]
    assert make_packs(code, packs, "tar") == first
    assert [path.stat().st_mtime_ns for path in first] == times
    (env / "b.py").write_text("2")
    second = make_packs(code, packs, "tar")
    assert second[0] != first[0]
    assert second[1] == first[1]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no mksquashfs here"):
        make_packs(code, packs, "squashfs")


@pytest.mark.parametrize(
    ("image", "gpus", "words"),
    [
        ("a b.sif", 1, "apptainer exec --nv --bind /data:/data 'a b.sif' sh "),
        ("image.sif", 0, "apptainer exec --bind /data:/data image.sif sh "),
        ("image.sqsh", 1, "--container-image=image.sqsh --container-mounts=/data:/data"),
    ],
)
def test_the_command_line_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, gpus: int, words: str
) -> None:
    (tmp_path / "srun").touch(0o755)  # submitit looks for it
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    request = Request(container=image, container_mounts="/data:/data", gpus_per_node=str(gpus))
    text = script(Batch(tmp_path, [Task(["train"], tmp_path)], request, 1))
    assert words in text
    assert ("apptainer" in text) != ("--container-image" in text)


def test_a_stub_of_apptainer_runs_the_job(tmp_path: Path, cluster: SlurmCluster) -> None:
    """Apptainer itself was never run."""
    stub = tmp_path / "bin" / "apptainer"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\n[ "$1" = exec ] && [ "$2" = image.sif ] || exit 9\nshift 2\nexec "$@"\n')
    stub.chmod(0o755)
    run = ClusterRun(cluster, tmp_path, config(tmp_path / "run"))
    run.submit("--container", "image.sif", "--setup", f"export PATH={stub.parent}:$PATH")
    assert run.finish()[-1].outcome == "finished"
