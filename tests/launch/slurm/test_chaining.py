"""`--after`: which jobs are waited for, and which folders are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.flags import command_parser, parse_command
from graftvit.launch.slurm.setting_layers import add_cluster_flags, asked_by, describe
from graftvit.launch.slurm.submission import dependency_on
from graftvit.models.errors import ConfigError
from support.slurm.slurm_folders import attempted, say, submitted
from support.slurm.sweep_folders import make_sweep


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


def test_jobs_of_runs_and_of_all_cells_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(tmp_path / "run", job_id="7")
    for place, cell in enumerate(make_sweep(tmp_path / "sweep", "seed=0..2").cells):
        submitted(cell.folder, job_id=f"9_{place}")
        if place == 1:
            attempted(cell.folder, "finished")
    say(monkeypatch, "RUNNING", ["7", "9_0", "9_2"])
    found = dependency_on([tmp_path / "run", tmp_path / "sweep"], "afterany:3")
    assert found == {"dependency": "afterany:3,afterok:7:9_0:9_2", "sbatch": {"kill_on_invalid_dep": "yes"}}


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "REQUEUED", "SUSPENDED"])
def test_what_may_still_finish_is_waited_for(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(tmp_path / "run", job_id="7")
    attempted(tmp_path / "run", "requeued")
    say(monkeypatch, state)
    assert dependency_on([tmp_path / "run"])["dependency"] == "afterok:7"


def test_what_has_finished_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(tmp_path / "run")
    attempted(tmp_path / "run", "finished")
    say(monkeypatch, "COMPLETED")
    assert dependency_on([tmp_path / "run"]) == {}


@pytest.mark.parametrize("outcome", ["failed", "stopped", "requeued", None])
def test_what_can_no_longer_finish_is_refused(
    outcome: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a run"
    submitted(run)
    attempted(run, outcome)
    say(monkeypatch, "FAILED")
    with pytest.raises(
        ConfigError, match=f"--after {run}: {run} has neither finished nor a job that could"
    ) as raised:
        dependency_on([run])
    assert f"graftvit resume '{run}'" in str(raised.value)


def test_what_was_never_submitted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was never submitted"):
        dependency_on([tmp_path])
    with pytest.raises(ConfigError, match="is no folder"):
        dependency_on([tmp_path / "none"])


def test_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, job in (("a", "7"), ("b", "8")):
        submitted(tmp_path / name, job_id=job)
    say(monkeypatch, "RUNNING")
    parser = command_parser("submit", "", [])
    add_cluster_flags(parser)
    words = ["--after", str(tmp_path / "a"), "--dependency=singleton", f"--after={tmp_path / 'b'}"]
    asked = asked_by(parse_command(parser, words)[0])
    assert asked.config().options()["dependency"] == "singleton,afterok:7:8"
    assert "  dependency          singleton,afterok:7:8  --after\n" in describe(asked)
