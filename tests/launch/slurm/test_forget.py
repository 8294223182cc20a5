"""`graftvit forget`: what `graftvit jobs` shows no more, and what it must go on showing."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.slurm.job_folder import known, registry_file, remember
from support.slurm.slurm_folders import say, submitted


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def runs(root: Path, *names: str) -> list[Path]:
    """Each with a job that has the number of its place."""
    folders = [root / name for name in names]
    for place, folder in enumerate(folders):
        submitted(folder, job_id=str(place))
        remember(folder)
    return folders


def test_a_run_is_forgotten_until_it_is_submitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, gone = runs(tmp_path, "one", "two", "gone")
    gone.rename(tmp_path / "elsewhere")
    say(monkeypatch, "COMPLETED")
    monkeypatch.chdir(tmp_path)
    assert main(["forget", "one", str(gone)]) == 0
    assert capsys.readouterr().out == f"forgotten: one\nforgotten: {gone}\n"
    assert known() == [two]
    assert (one / "jobs").is_dir()
    assert main(["forget", str(one)]) == 2
    assert f"{one} is not in the list of runs" in capsys.readouterr().err
    remember(one)
    assert known() == [two, one]


def test_a_run_with_a_job_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, active = runs(tmp_path, "ended", "active")
    say(monkeypatch, "RUNNING", ["1"])
    assert main(["forget", str(active)]) == 2
    assert (
        f"{active} is job 1, and stays in the list: `graftvit stop {active}` ends it"
        in capsys.readouterr().err
    )
    assert main(["forget", "--ended"]) == 0
    assert capsys.readouterr().out == f"forgotten: {ended}\n"
    assert known() == [active]
    assert main(["forget", "--ended"]) == 0
    assert "no run in the list has ended" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["run", "--ended"]])
def test_what_to_forget_must_be_clear(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", *words]) == 2
    assert "give either the runs to forget, or --ended" in capsys.readouterr().err


def test_one_run_under_two_names_is_listed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (one,) = runs(tmp_path, "one")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    detour = tmp_path / "deep" / ".." / "one"
    remember(detour)
    assert known() == [one]
    with registry_file().open("a") as file:
        file.write(f"{tmp_path}/link/../../one\n")  # as it was written before; the text alone leads elsewhere
    assert known() == [one]
    say(monkeypatch, "COMPLETED")
    assert main(["forget", str(detour)]) == 0
    assert known() == []
