"""Submitting again: what is left of a folder, and how it goes back to the cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from graftvit.launch.cli import main
from graftvit.launch.load_config import dump_config
from graftvit.launch.slurm import jobs, submission
from graftvit.launch.slurm import stopping as resume_module
from graftvit.launch.slurm.batch import Launch, Request, script
from graftvit.launch.slurm.preview import preview_again
from graftvit.launch.slurm.scheduler import JobState
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.stopping import Unfinished, find_unfinished, resume
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config
from support.slurm.slurm_folders import attempted, say, submitted
from support.slurm.sweep_folders import make_sweep

GONE = "UNKNOWN"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Launch]:
    """What would have gone to the cluster; the jobs are 100, 200, ..."""
    monkeypatch.chdir(tmp_path)  # for `resume` goes to where the run was submitted from
    found: list[Launch] = []

    def submit(launch: Launch) -> list[str]:
        found.append(launch)
        many = len(launch.requests) > 1
        return [
            f"{len(found)}00_{place}" if many else f"{len(found)}00" for place in range(len(launch.requests))
        ]

    monkeypatch.setattr(submission, "submit", submit)
    monkeypatch.setattr(resume_module, "test_only", lambda launch: "")
    monkeypatch.setattr(submission, "remember", lambda folder: None)
    return found


def make_comparison(folder: Path) -> list[Path]:
    """Two cells and their teacher, as jobs 7, 8_0 and 8_1."""
    cells = [folder / "cells" / name for name in ("linear-8", "uniform-8")]
    submitted(folder / "teacher", job_id="7", command=["compare", "c.yaml", "--only", "teacher"])
    for place, cell in enumerate(cells):
        submitted(cell, job_id=f"8_{place}", command=["compare", "c.yaml", "--cell", cell.name])
    return cells


def test_a_folder_that_was_never_submitted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} was never submitted"):
        find_unfinished(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        find_unfinished(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("outcomes", "left"),
    [
        ([], True),
        ([None], True),
        (["failed"], True),
        (["stopped"], True),
        (["finished"], False),
        (["requeued", "finished"], False),
        (["finished", "failed"], True),
    ],
)
def test_a_run_is_left_until_its_last_attempt_finishes(
    tmp_path: Path, outcomes: list[str | None], left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(tmp_path)
    for outcome in outcomes:
        attempted(tmp_path, outcome)
    say(monkeypatch, GONE)
    if left:
        assert list(find_unfinished(tmp_path).submissions) == [tmp_path]
    else:
        with pytest.raises(ConfigError, match=f"{tmp_path} has finished: there is nothing to resume"):
            find_unfinished(tmp_path)


@pytest.mark.parametrize(
    ("state", "free"),
    [("PENDING", False), ("RUNNING", False), ("COMPLETING", False), ("REQUEUED", False), ("FAILED", True),
     ("CANCELLED", True), ("NODE_FAIL", True), ("PREEMPTED", True), ("COMPLETED", True), (GONE, True)],
)  # fmt: skip
def test_a_run_with_a_job_is_not_resumed(
    tmp_path: Path, state: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(tmp_path, job_id="77")
    attempted(tmp_path, None)
    say(monkeypatch, state)
    if free:
        assert list(find_unfinished(tmp_path).submissions) == [tmp_path]
    else:
        with pytest.raises(ConfigError, match=f"is job 77 already: `graftvit jobs {tmp_path}` shows it"):
            find_unfinished(tmp_path)


def test_of_a_sweep_what_failed_and_has_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, failed, running, stopped, begun = make_sweep(tmp_path, "seed=0..4").cells
    for place, cell in enumerate((finished, failed, running, stopped, begun)):
        submitted(cell.folder, job_id=f"5_{place}")
    attempted(finished.folder, "finished")
    attempted(failed.folder, "failed")
    attempted(stopped.folder, "stopped")
    attempted(begun.folder, None)
    say(monkeypatch, "RUNNING", ["5_2"])
    assert list(find_unfinished(tmp_path).submissions) == [failed.folder, stopped.folder, begun.folder]
    say(monkeypatch, "RUNNING")
    with pytest.raises(ConfigError, match="is job 5 already"):
        find_unfinished(tmp_path)


def test_two_cells_go_again_as_they_were_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Launch]
) -> None:
    cells = make_sweep(tmp_path, "seed=0..3").cells
    asked = ClusterConfig(cluster="slurm", gpus_per_node=4, dependency="afterok:3", mem="9G")
    for place, cell in enumerate(cells):
        values = asked.model_dump(mode="json")
        submitted(
            cell.folder, job_id=f"5_{place}", resources=values, cpus_per_task=6, directory=str(tmp_path)
        )
        attempted(cell.folder, "failed" if place % 2 else "finished")
    say(monkeypatch, GONE)
    unfinished = find_unfinished(tmp_path)
    # the job that was waited for may be forgotten by now, and would be refused
    config = ClusterConfig.model_validate(unfinished.resources)
    assert config == asked.model_copy(update={"dependency": None})
    said = resume(unfinished, config, unchecked=True)
    (launch,) = sent
    assert [request.output_dir for request in launch.requests] == [cells[1].folder, cells[3].folder]
    assert launch.requests[0].words == ["train", str(cells[1].folder / "config.yaml")]
    assert (launch.cpus_per_task, launch.folder) == (6, tmp_path)
    assert said.startswith(f"submitted job 100 (2 cells) in {tmp_path}\n")
    assert Path.cwd() == tmp_path


def test_cells_wait_for_a_teacher_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Launch]
) -> None:
    cells = make_comparison(tmp_path)
    say(monkeypatch, "PENDING")
    with pytest.raises(ConfigError, match="is job 8 already"):
        find_unfinished(tmp_path)
    attempted(tmp_path / "teacher", "failed")
    say(monkeypatch, GONE)
    unfinished = find_unfinished(tmp_path)
    assert unfinished.first == Request(["compare", "c.yaml", "--only", "teacher"], tmp_path / "teacher")
    said = resume(unfinished, ClusterConfig(), unchecked=True)
    teacher, rest = sent
    assert (teacher.requests, teacher.after) == ([unfinished.first], None)
    assert ([request.output_dir for request in rest.requests], rest.after) == (cells, "100")
    assert said.startswith(f"submitted job 200 (2 cells), after job 100 for the teacher, in {tmp_path}\n")


def test_a_teacher_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = make_comparison(tmp_path)
    attempted(tmp_path / "teacher", "finished")
    attempted(cells[0], "finished")
    say(monkeypatch, GONE)
    found = find_unfinished(tmp_path)
    assert (list(found.submissions), found.first) == ([cells[1]], None)
    attempted(cells[1], "finished")
    with pytest.raises(ConfigError, match="has finished"):
        find_unfinished(tmp_path)


def test_a_comparison_of_which_only_the_teacher_was_submitted(tmp_path: Path) -> None:
    submitted(tmp_path / "teacher")
    (tmp_path / "cells" / "linear-8").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"the cells of .* were never submitted"):
        find_unfinished(tmp_path)


def test_a_single_cell_is_told_from_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Launch]
) -> None:
    (cell,) = make_sweep(tmp_path, "seed=0").cells
    submitted(cell.folder)
    say(monkeypatch, GONE)
    said = resume(find_unfinished(tmp_path), ClusterConfig(), unchecked=True)
    assert "job 100 (1 cell) in" in said
    run = submitted(tmp_path / "run")
    left = Unfinished(run.output_dir, {run.output_dir: run.submission()})  # type: ignore[dict-item]
    assert f"job 200 in {run.output_dir}" in resume(left, ClusterConfig(), unchecked=True)


def test_what_waits_for_a_teacher_is_cancelled_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = tmp_path / "srun"  # submitit looks for it
    srun.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    requests = [Request(["train"], tmp_path / "a"), Request(["train"], tmp_path / "b")]
    text = script(Launch("x", tmp_path, requests, ClusterConfig(dependency="afterany:1"), 1, after="7"))
    assert "#SBATCH --dependency=afterok:7\n" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text
    alone = script(Launch("x", tmp_path, requests, ClusterConfig(dependency="afterany:1"), 1))
    assert "#SBATCH --dependency=afterany:1\n" in alone
    assert "kill-on-invalid-dep" not in alone


def test_processes_that_cannot_share_the_step_of_the_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Launch]
) -> None:
    run = config(tmp_path / "run", optim={"accum_iter": 2, "max_steps": 3})
    train(run)
    longer = config(tmp_path / "run", optim={"accum_iter": 2, "max_steps": 9})
    (tmp_path / "run" / "config.yaml").write_text(dump_config(longer))
    submitted(run.output_dir)
    attempted(run.output_dir, "failed")
    say(monkeypatch, GONE)
    unfinished = find_unfinished(run.output_dir)

    def here(processes: int) -> ClusterConfig:
        return ClusterConfig(cluster="local", nodes=1, gpus_per_node=0, tasks_per_node=processes)

    with pytest.raises(ConfigError, match="which 3 processes cannot share: use 1 or 2 processes"):
        resume(unfinished, here(3))
    told = preview_again(unfinished, here(2)).text
    assert "16 x 1 accumulated x 2 processes = 32 images" in told
    assert "after step 3" in told
    assert told.endswith(f"again: {run.output_dir}\n\n--cluster local: 2 processes on this machine\n")
    assert not sent
    resume(unfinished, here(2))
    resume(unfinished, here(3), unchecked=True)
    assert len(sent) == 2


@pytest.mark.parametrize("dry_run", ["--dry_run", "--dry-run"])
def test_flags_of_the_command(
    dry_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tmp_path)
    say(monkeypatch, GONE)
    here = ["--cluster", "local", "--nodes=1", "--gpus-per-node", "0", "--tasks_per_node=3"]
    assert main(["resume", str(tmp_path), *here, dry_run]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"\n\nagain: {tmp_path}\n\n--cluster local: 3 processes on this machine\n")
    assert "  tasks_per_node     3                      --tasks_per_node\n" in printed


def test_a_job_that_was_told_to_stop_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = submitted(tmp_path, job_id="7")
    looks = iter(["COMPLETING", "COMPLETING", "COMPLETED"])
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState(next(looks))))
    monkeypatch.setattr(resume_module, "EVERY", 0.0)
    resume_module.wait_for_stops(tmp_path)  # it ends for another reason: nobody waits
    assert capsys.readouterr().err == ""
    files.stop_request("7").touch()
    resume_module.wait_for_stops(tmp_path)
    assert capsys.readouterr().err == "graftvit: waiting for job 7, which was told to stop, to end\n"
    assert next(looks, None) is None


@pytest.mark.parametrize("words", [[], ["--dry_run"], ["--unchecked"]])
def test_a_folder_of_submission_that_is_gone_is_not_replaced_by_the_present_one(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Launch],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    submitted(tmp_path / "run", directory=str(tmp_path / "a b"))
    say(monkeypatch, GONE)
    here = ["--cluster", "local", "--gpus_per_node", "0"]
    assert main(["resume", str(tmp_path / "run"), *here, *words]) == 2
    said = capsys.readouterr().err
    assert f"was submitted from {tmp_path / 'a b'}, which is not there any more" in said
    assert f"`mkdir -p '{tmp_path / 'a b'}'`" in said
    assert not sent
    (tmp_path / "a b").mkdir()
    assert main(["resume", str(tmp_path / "run"), *here, *words]) == 0
    assert Path.cwd() == tmp_path / "a b"


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_in_another_folder_is_resumed_there(
    monkeypatch: pytest.MonkeyPatch, sent: list[Launch], tmp_path: Path, how: str
) -> None:
    """The settings that were frozen with it name the folder where it was."""
    old, new = tmp_path / "old", tmp_path / "new"
    frozen = old / "jobs" / "config.yaml"
    settings = config(old)
    old.mkdir()
    own = {"output_dir": str(old), "inode": old.stat().st_ino}
    submitted(old, command=["train", str(frozen)], directory=str(tmp_path), **own)
    frozen.write_text(dump_config(settings))
    attempted(old, "stopped")
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new)
        shutil.rmtree(old)
    say(monkeypatch, GONE)
    found = find_unfinished(new)
    resume(found, ClusterConfig(cluster="debug", gpus_per_node=0), unchecked=True)
    (request,) = sent[0].requests
    there = ["train", str(new / "jobs" / "config.yaml"), "--output_dir", str(new)]
    assert (request.words, request.output_dir) == (there, new)
