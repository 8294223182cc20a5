"""What sbatch says, where a site has put a program of its own in front of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.slurm import submit as module
from graftvit.launch.slurm.batch import Launch, Request
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.models.errors import ConfigError, GraftError


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    launch = Launch("x", tmp_path, [Request(["train"], tmp_path)], ClusterConfig(), 1)
    launch.place.mkdir(parents=True)
    return launch


def answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, lines: str = "", queued: str = ""
) -> None:
    """An sbatch that says so, and a queue that has the job under a number, or does not know it (yet)."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(module, "number_by_name", lambda place: queued)


@pytest.mark.parametrize(
    "said",
    [
        "123",
        "123;cluster",
        "Welcome to the cluster!\n5 jobs are waiting\n123",
        "123\n\nthis job will cost 5 units",
        "123;cluster\nbudget left: 77 %",
        "Submitted batch job 123",
        "Submitted batch job 123 on cluster x",
        "sbatch: lua: default partition set\nSubmitted batch job 123 on cluster x\ngood luck",
    ],
)
def test_the_number_of_the_job_is_found(
    said: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path, monkeypatch, said)
    assert module._sbatch(launch) == "123"


def test_where_it_could_be_another_number_the_queue_is_asked(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path, monkeypatch, "123\n500", queued="123")
    assert module._sbatch(launch) == "123"


@pytest.mark.parametrize("lines", ["", "echo a warning of the site >&2"])
def test_a_job_that_was_taken_is_not_called_refused(
    lines: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(tmp_path, monkeypatch, "it is done", lines)
    with pytest.raises(GraftError, match="may be queued all the same") as raised:
        module._sbatch(launch)
    assert not isinstance(raised.value, ConfigError)


def test_a_refusal_is_one(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "", "echo no such account >&2; exit 1")
    with pytest.raises(ConfigError, match="refused the job: no such account"):
        module._sbatch(launch)
