"""Commands, folders and nodes that a submission needs, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from graftvit.launch.slurm import checks
from graftvit.launch.slurm.checks import check_commands, check_folder
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.models.errors import ConfigError
from support.runs.typed import Typed
from support.slurm.cluster_users import user_with_recipe

COMMANDS = {"sbatch", "scontrol", "sinfo", "srun"}


def write_commands(folder: Path, names: set[str], lines: str = "") -> None:
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "--cluster slurm: no sbatch, scontrol, sinfo, srun here; submit from a login node"),
        ("echo 'slurm_load: Unable to contact\nslurm controller' >&2; exit 1", "scontrol does not reach the cluster: "
         "slurm_load: Unable to contact slurm controller"),
    ],
    ids=["without slurm", "without an answer"],
)  # fmt: skip
def test_without_slurm(
    lines: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed
) -> None:
    user_with_recipe(tmp_path, monkeypatch, {"PATH": str(tmp_path)}, gpus_per_node=0)
    if lines:
        write_commands(tmp_path, COMMANDS, lines)
    before = sorted(tmp_path.rglob("*"))
    told = typed("submit run.yaml", code=2).err
    assert said in told
    assert told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("missing", ["sinfo", "srun"])
def test_every_command_is_looked_for(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_commands(tmp_path, COMMANDS - {missing})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"no {missing} here"):
        check_commands()


def test_folders_that_nodes_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ClusterConfig(shared_folders=(tmp_path / "scratch",))
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    for inside in ("scratch/new/run", "scratch", "link/run"):
        check_folder(tmp_path / inside, shared)
    for outside in ("scratch2", "scratch/../run"):
        with pytest.raises(ConfigError, match="in none of the folders"):
            check_folder(tmp_path / outside, shared)
    monkeypatch.setattr(checks, "TEMPORARY", ())
    check_folder(tmp_path / "run", ClusterConfig())
    for kind in ("tmpfs", "ramfs"):
        monkeypatch.setattr(checks, "_file_system", lambda _, kind=kind: kind)
        with pytest.raises(ConfigError, match="on this machine alone"):
            check_folder(tmp_path / "run", ClusterConfig())


def test_the_file_system_of_a_folder_that_is_yet_to_be_made() -> None:
    assert checks._file_system(Path("/proc/self/new/folder")) == "proc"
    if os.path.ismount("/dev/shm"):
        assert checks._file_system(Path("/dev/shm/new/folder")) == "tmpfs"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ClusterConfig(shared_folders=(tmp_path,))
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(ConfigError, match="is a file"):
            check_folder(tmp_path / place, shared)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    with pytest.raises(ConfigError, match=f"{tmp_path} is not yours to write"):
        check_folder(tmp_path / "a" / "b", shared)


SIZES = {"0": 0, "4000": 4000, "2G": 2048, "2gb": 2048, "1T": 1 << 20, "512K": 0, "2048kb": 2, None: 0}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_of_memory(text: str | None, size: int) -> None:
    assert checks._mebibytes(text) == size


SINFO = """\
a|64|515000|idle|gpu:a100:8(S:0-1)
b|64+|257000+|mixed-|gpu:1
a|64|515000|idle|gpu:a100:8(S:0-1)
c|8|100|drained*|(null)
d|8|100|idle*|gpu:tesla:2,gpu:kepler:1,gpu_mem:40
"""
PARTITION = "PartitionName=p Default=YES MaxTime=UNLIMITED MaxNodes=UNLIMITED\n"


def test_nodes_as_sinfo_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "output", lambda *command: SINFO if command[0] == "sinfo" else PARTITION)
    assert [(node.name, node.cpus, node.gpus, node.away) for node in checks.nodes_of("p")] == [
        ("a", 64, {"a100": 8}, ""), ("b", 64, {"": 1}, ""), ("c", 8, {}, "drained"),
        ("d", 8, {"tesla": 2, "kepler": 1}, "down"),
    ]  # fmt: skip
    checks.check_resources(ClusterConfig(gpus_per_node=1, nodes=3), 1)
    checks.check_resources(ClusterConfig(gpus_per_node="A100:8", tasks_per_node=1), 1)
    for asked, cores, why in (
        (ClusterConfig(gpus_per_node="a100:1", nodes=2), 1, "1 of its 4 nodes have so many; 2 are asked for"),
        (ClusterConfig(gpus_per_node=2, nodes=3), 1, "2 of its 4 nodes have so many; 3 are asked for"),
        (ClusterConfig(gpus_per_node=2, nodes=2, tasks_per_node=1), 64, "cores"),  # others have these
    ):
        with pytest.raises(ConfigError, match=why):
            checks.check_resources(asked, cores)
