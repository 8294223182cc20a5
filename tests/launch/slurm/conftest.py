"""A home for each test, a scheduler that says what it wants, and real clusters, or the reason for having none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import scheduler
from support.slurm.slurm_cluster import LONGEST_FOLDER, SlurmCluster, missing_programs
from support.slurm.slurm_config import ClusterOptions
from support.slurm.slurm_folders import FakeSlurm
from support.slurm.slurm_processes import ClusterError, marked_under

REQUIRED = "GRAFTVIT_TEST_SLURM"
"""Set in the environment where the packages were installed: there a cluster that does not start is a failure."""

StartCluster = Callable[..., SlurmCluster]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configuration, registry and surroundings of nobody else; an administrator's site file would be below `all`."""
    for name, folder in {"CONFIG_HOME": "xdg", "STATE_HOME": "state", "CONFIG_DIRS": "all"}.items():
        monkeypatch.setenv(f"XDG_{name}", str(tmp_path / folder))
    for name in [name for name in os.environ if name.startswith("SBATCH_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(monkeypatch)


@pytest.fixture(scope="session")
def cluster_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Makes names of new folders; when the session ends, no process may be left that works in one."""
    base = tmp_path_factory.getbasetemp()
    short = len(os.fsencode(base / "slurm99")) <= LONGEST_FOLDER
    parent = base if short else Path(tempfile.mkdtemp(prefix="graftvit-", dir="/tmp"))
    made: list[Path] = []

    def folder() -> Path:
        made.append(parent / f"slurm{len(made)}")
        return made[-1]

    yield folder
    left = [process for path in made for process in marked_under(path)]
    if not short:
        shutil.rmtree(parent)
    if left:
        pytest.fail(f"left running: {', '.join(map(str, left))}")


def start_or_skip(stack: ExitStack, folder: Path, options: ClusterOptions) -> SlurmCluster:
    reason = missing_programs(options)
    if not reason:
        try:
            return stack.enter_context(SlurmCluster(folder, options))
        except ClusterError as error:
            reason = f"no Slurm cluster starts here: {error}"
    if os.environ.get(REQUIRED) and options.mode == "host":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(cluster_folders: Callable[[], Path], request: pytest.FixtureRequest) -> Iterator[SlurmCluster]:
    """Three nodes on this host, for all tests of a file; or what the file says under `CLUSTER`."""
    with ExitStack() as stack:
        yield start_or_skip(stack, cluster_folders(), getattr(request.module, "CLUSTER", ClusterOptions()))


@pytest.fixture
def on_cluster(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, of which this process is a user."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scheduler, "_silent", {})
    return cluster


@pytest.fixture
def start_cluster(cluster_folders: Callable[[], Path]) -> Iterator[StartCluster]:
    """Starts a cluster with the given `ClusterOptions`; it is stopped when the test ends."""
    with ExitStack() as stack:

        def start(**options: Any) -> SlurmCluster:
            return start_or_skip(stack, cluster_folders(), ClusterOptions(**options))

        yield start
