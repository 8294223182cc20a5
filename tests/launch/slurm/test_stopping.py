"""`stop`, `resume` and `forget`: whatever is in the way, each job is ended, continued or kept in the list."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.load_config import dump_config
from graftvit.launch.slurm import jobs, lookup, scheduler, stopping, submission
from graftvit.launch.slurm.batch import Launch, Request, script
from graftvit.launch.slurm.job_folder import JobFolder, known, registry_file, remember
from graftvit.launch.slurm.preview import preview_again
from graftvit.launch.slurm.scheduler import JobState, NoSuchJobError
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.stopping import Unfinished, find_unfinished, resume
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config
from support.runs.patience import until
from support.runs.typed import Typed
from support.slurm.slurm_cluster import SlurmCluster
from support.slurm.slurm_folders import SILENT, FakeSlurm, attempted, submitted
from support.slurm.sweep_folders import make_sweep

WAIT = ("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 100")
GONE = JobState()


@pytest.fixture(autouse=True)
def names(slurm: FakeSlurm) -> None:
    """The queue has no job under the name of a run."""
    slurm.queue()


def cells(root: Path, *ids: str) -> list[Path]:
    """A cell for each job."""
    return [submitted(root / "cells" / f"cell-{job}", job_id=job).output_dir for job in ids]


def controller_of(folder: Path, program: str = "input()") -> subprocess.Popen[str]:
    """A process that looks like submitit's for a run in `folder`."""
    words = [sys.executable, "-c", program, lookup.CONTROLLER, str(folder / "logs")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    submitted(folder, cluster="local", job_id=str(process.pid))
    return process


@pytest.mark.parametrize(("words", "number"), [([], signal.SIGTERM), (["--now"], signal.SIGINT)])
def test_a_local_run_is_stopped_through_its_controller(
    words: list[str], number: int, tmp_path: Path, typed: Typed
) -> None:
    program = (
        "import signal; signal.pthread_sigmask(0, [15, 2]); print(flush=True); print(signal.sigwait([15, 2]))"
    )
    controller = controller_of(tmp_path, program)
    assert controller.stdout is not None
    controller.stdout.readline()
    assert f"`graftvit jobs resume {tmp_path}` resumes" in typed("jobs", "stop", tmp_path, *words).out
    assert JobFolder(tmp_path).asked_to_stop(str(controller.pid))
    assert int(controller.communicate(timeout=60)[0]) == number


@pytest.mark.slurm
def test_a_cell_that_has_just_ended_keeps_no_other_from_being_stopped(
    on_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: Typed
) -> None:
    ids = ["1", *(on_cluster.run(*WAIT).strip() for _ in range(2))]  # no job has number 1 (any more)
    cells(tmp_path, *ids)
    asked, real = [], jobs.job_states

    def states(wanted: Iterable[str], tries: int) -> dict[str, JobState]:
        asked.append(list(wanted))
        first = len(asked) == 1
        return dict.fromkeys(asked[0], JobState("RUNNING")) if first else real(asked[-1], tries=tries)

    monkeypatch.setattr(jobs, "job_states", states)
    said = typed("jobs", "stop", tmp_path, "--now").out
    assert sorted(line.split()[1] for line in said.splitlines()) == sorted(ids[1:])
    left = ("squeue", "--noheader", f"--jobs={','.join(ids[1:])}")
    until(lambda: not on_cluster.run(*left).strip(), "the end of the others", every=0.2)


def test_a_job_that_is_ending_already_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    submitted(tmp_path, job_id="7")
    slurm.says("COMPLETING")

    def gone(job_id: str, name: str) -> None:
        raise NoSuchJobError("scancel failed: error: Kill job error on job id 7: Invalid job id specified")

    monkeypatch.setattr(stopping, "signal_job", gone)
    assert typed("jobs", "stop", tmp_path).out == f"job 7 of {tmp_path} is ending already\n"
    assert JobFolder(tmp_path).asked_to_stop("7")  # by the next attempt, too, if there is one


def test_a_signal_that_could_not_be_sent_leaves_no_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    files = submitted(tmp_path, job_id="7")
    slurm.says("RUNNING")

    def fail(*_: object) -> None:
        raise SILENT

    monkeypatch.setattr(stopping, "signal_job", fail)
    typed("jobs", "stop", tmp_path, code=1)
    assert not files.asked_to_stop("7")
    assert jobs.describe_run(tmp_path).state == "running"


def test_a_run_of_another_user_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, typed: Typed
) -> None:
    folders = [tmp_path / "cells" / name for name in ("his", "mine")]
    his, mine = map(controller_of, folders)
    touch, kill = Path.touch, os.kill

    def refuse(path: Path, **kwargs: object) -> None:
        if folders[0] in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        touch(path)

    def forbid(pid: int, number: int) -> None:
        if pid == his.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        said = typed("jobs", "stop", tmp_path, code=1)
    assert f"job {mine.pid} of {folders[1]} saves" in said.out
    assert said.err.startswith(f"graftvit: error: job {his.pid} of {folders[0]} continues: ")
    assert "it is the run of" in said.err
    assert said.err.count("\n") == 1
    assert mine.wait(10) != 0
    monkeypatch.setattr(lookup.os, "kill", forbid)
    assert f"process {his.pid} cannot be signalled" in typed("jobs", "stop", tmp_path, code=1).err
    his.communicate("\n")


def test_several_runs_are_stopped_and_one_that_is_none_keeps_no_other_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    runs = [
        submitted(tmp_path / name, job_id=job).output_dir
        for name, job in (("a", "0"), ("b", "1"), ("c", "2"))
    ]
    slurm.says({"0": "PENDING", "2": "PENDING"})
    told: list[str] = []
    monkeypatch.setattr(stopping, "cancel", told.append)
    assert f"{runs[1]} has no waiting or running job: it is unknown" in typed("jobs", "stop", *runs).out
    assert told == ["0", "2"]
    assert "nowhere is no folder" in typed("jobs", "stop", tmp_path / "nowhere", *runs, code=2).err
    assert told == ["0", "2"] * 2

    def refuse(job: str) -> None:
        told.append(job)
        raise GraftError("not yours")

    told.clear()
    monkeypatch.setattr(stopping, "PAUSE", 0.0)
    monkeypatch.setattr(stopping, "cancel", refuse)
    typed("jobs", "stop", *runs, code=1)
    assert set(told) == {"0", "2"}
    assert "RUN" in typed("jobs", "stop", code=2).err


@pytest.mark.parametrize("now", [False, True])
def test_cells_that_wait_are_cancelled_in_one_call_before_those_that_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed, now: bool
) -> None:
    """Else each node that a running cell leaves is given to another cell, which is killed in its first second."""
    ids = [f"9_{place}" for place in range(6)]
    cells(tmp_path, *ids)
    slurm.says({job: "RUNNING" if job in ids[:2] else "PENDING" for job in ids})
    orders: list[tuple[str, ...]] = []
    monkeypatch.setattr(scheduler, "ask", lambda *words, **_: orders.append(words) or "")
    said = typed("jobs", "stop", tmp_path, *(["--now"] if now else []))
    signals = [("scancel", "--signal=USR2", job) for job in ids[:2]]
    assert orders == ([("scancel", *ids[2:], *ids[:2])] if now else [("scancel", *ids[2:]), *signals])
    assert said.out.count("is cancelled") == (6 if now else 4)
    assert all(JobFolder(tmp_path / "cells" / f"cell-{job}").asked_to_stop(job) for job in ids)


def test_a_cell_that_may_not_be_cancelled_is_told_among_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    cells(tmp_path, "9_0", "9_1")
    slurm.says("PENDING")
    monkeypatch.setattr(stopping, "PAUSE", 0.0)

    def refuse(*ids: str) -> None:
        if "9_1" in ids:
            raise GraftError("Access/permission denied")

    monkeypatch.setattr(stopping, "cancel", refuse)
    said = typed("jobs", "stop", tmp_path, code=1)
    assert (said.out.count("is cancelled"), said.err.count("continues")) == (1, 1)
    assert "job 9_1" in said.err


@pytest.mark.slurm
def test_a_suspended_job_is_shown_so_and_cancelled(
    on_cluster: SlurmCluster, tmp_path: Path, typed: Typed
) -> None:
    job = on_cluster.run(*WAIT).strip()
    files = submitted(tmp_path, job_id=job)
    until(lambda: jobs.job_states([job])[job].state == "RUNNING", "the job", every=0.2)
    on_cluster.run("scontrol", "suspend", job)
    status = jobs.describe_run(tmp_path)
    assert (status.state, status.why) == ("running", "suspended")
    files.begin(job_id=job, restart=0, nodes=["n1"], world_size=1)
    assert jobs.describe_run(tmp_path).why == "suspended"
    assert f"job {job} of {tmp_path} was suspended and is cancelled" in typed("jobs", "stop", tmp_path).out
    until(lambda: jobs.describe_run(tmp_path).state == "cancelled", "its end", every=0.2)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Launch]:
    """What would have gone to the cluster; the jobs are 100, 200, ..."""
    monkeypatch.chdir(tmp_path)  # for `resume` goes to where the run was submitted from
    found: list[Launch] = []

    def submit(launch: Launch) -> list[str]:
        found.append(launch)
        places = range(len(launch.requests))
        return [f"{len(found)}00_{place}" for place in places] if len(places) > 1 else [f"{len(found)}00"]

    monkeypatch.setattr(submission, "submit", submit)
    monkeypatch.setattr(stopping, "test_only", lambda launch: "")
    monkeypatch.setattr(submission, "remember", lambda folder: None)
    return found


def left(folder: Path) -> list[Path]:
    return list(find_unfinished(folder).submissions)


@pytest.mark.parametrize(
    "last",
    [[], [None], ["failed"], ["stopped"], ["finished", "failed"], ["finished"], ["requeued", "finished"]],
)
def test_a_run_is_left_until_its_last_attempt_finishes(
    tmp_path: Path, last: list[str | None], slurm: FakeSlurm
) -> None:  # fmt: skip
    submitted(tmp_path)
    for outcome in last:
        attempted(tmp_path, outcome)
    slurm.says(GONE)
    if last[-1:] != ["finished"]:
        assert left(tmp_path) == [tmp_path]
    else:
        with pytest.raises(ConfigError, match=f"{tmp_path} has finished: there is nothing to resume"):
            find_unfinished(tmp_path)


FREE = ("FAILED", "CANCELLED", "NODE_FAIL", "PREEMPTED", "COMPLETED", "UNKNOWN")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", *FREE])
def test_a_run_with_a_job_is_not_resumed(tmp_path: Path, state: str, slurm: FakeSlurm) -> None:
    submitted(tmp_path)
    attempted(tmp_path)
    slurm.says(state)
    if state in FREE:
        assert left(tmp_path) == [tmp_path]
    else:
        with pytest.raises(ConfigError, match=f"is job 12 already: `graftvit jobs {tmp_path}` shows it"):
            find_unfinished(tmp_path)


def test_of_a_sweep_what_failed_and_has_no_job(tmp_path: Path, slurm: FakeSlurm) -> None:
    found = [cell.folder for cell in make_sweep(tmp_path, "seed=0..4").cells]
    for place, (cell, outcome) in enumerate(
        zip(found, ("finished", "failed", "", "stopped", None), strict=True)
    ):
        submitted(cell, job_id=f"5_{place}")
        if outcome != "":
            attempted(cell, outcome)
    slurm.says({"5_2": "RUNNING"})
    assert left(tmp_path) == [found[1], found[3], found[4]]
    slurm.says("RUNNING")
    with pytest.raises(ConfigError, match="is job 5 already"):
        find_unfinished(tmp_path)


def test_two_cells_go_again_as_they_were_submitted(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Launch]
) -> None:
    found = [cell.folder for cell in make_sweep(tmp_path, "seed=0..3").cells]
    asked = ClusterConfig(cluster="slurm", gpus_per_node=4, dependency="afterok:3", mem="9G")
    own = {"resources": asked.model_dump(mode="json"), "cpus_per_task": 6, "directory": str(tmp_path)}
    for place, cell in enumerate(found):
        submitted(cell, job_id=f"5_{place}", **own)
        attempted(cell, "failed" if place % 2 else "finished")
    slurm.says(GONE)
    unfinished = find_unfinished(tmp_path)
    # the job that was waited for may be forgotten by now, and would be refused
    again = ClusterConfig.model_validate(unfinished.resources)
    assert again == asked.model_copy(update={"dependency": None})
    said = resume(unfinished, again, unchecked=True)
    (launch,) = sent
    assert [request.output_dir for request in launch.requests] == [found[1], found[3]]
    assert launch.requests[0].words == ["train", str(found[1] / "config.yaml")]
    assert (launch.cpus_per_task, launch.folder) == (6, tmp_path)
    assert said.startswith(f"submitted job 100 (2 cells) in {tmp_path}\n")
    assert Path.cwd() == tmp_path


def test_the_teacher_of_a_comparison_is_made_again_only_if_it_is_not_there(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Launch]
) -> None:
    found = [tmp_path / "cells" / name for name in ("linear-8", "uniform-8")]
    submitted(tmp_path / "teacher", job_id="7", command=["compare", "c.yaml", "--only", "teacher"])
    found[0].mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"the cells of .* were never submitted"):
        find_unfinished(tmp_path)
    for place, cell in enumerate(found):
        submitted(cell, job_id=f"8_{place}", command=["compare", "c.yaml", "--cell", cell.name])
    slurm.says("PENDING")
    with pytest.raises(ConfigError, match="is job 8 already"):
        find_unfinished(tmp_path)
    attempted(tmp_path / "teacher", "failed")
    slurm.says(GONE)
    unfinished = find_unfinished(tmp_path)
    assert unfinished.first == Request(["compare", "c.yaml", "--only", "teacher"], tmp_path / "teacher")
    said = resume(unfinished, ClusterConfig(), unchecked=True)
    teacher, rest = sent
    assert (teacher.requests, teacher.after) == ([unfinished.first], None)
    assert ([request.output_dir for request in rest.requests], rest.after) == (found, "100")
    assert said.startswith(f"submitted job 200 (2 cells), after job 100 for the teacher, in {tmp_path}\n")
    for folder in (tmp_path / "teacher", found[0]):
        attempted(folder, "finished")
    slurm.says(GONE)
    unfinished = find_unfinished(tmp_path)
    assert (list(unfinished.submissions), unfinished.first) == ([found[1]], None)
    attempted(found[1], "finished")
    with pytest.raises(ConfigError, match="has finished"):
        find_unfinished(tmp_path)


def test_a_single_cell_is_told_from_a_run(tmp_path: Path, slurm: FakeSlurm, sent: list[Launch]) -> None:
    (cell,) = make_sweep(tmp_path, "seed=0").cells
    submitted(cell.folder)
    slurm.says(GONE)
    assert "job 100 (1 cell) in" in resume(find_unfinished(tmp_path), ClusterConfig(), unchecked=True)
    run = submitted(tmp_path / "run")
    alone = Unfinished(run.output_dir, {run.output_dir: run.submission()})  # type: ignore[dict-item]
    assert f"job 200 in {run.output_dir}" in resume(alone, ClusterConfig(), unchecked=True)


def test_what_waits_for_a_teacher_is_cancelled_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").touch(0o755)  # submitit looks for it
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    requests = [Request(["train"], tmp_path / "a"), Request(["train"], tmp_path / "b")]
    after, alone = (
        script(Launch("x", tmp_path, requests, ClusterConfig(dependency="afterany:1"), 1, after=job))
        for job in ("7", None)
    )
    assert "#SBATCH --dependency=afterok:7\n" in after
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in after
    assert "#SBATCH --dependency=afterany:1\n" in alone
    assert "kill-on-invalid-dep" not in alone


def test_processes_that_cannot_share_the_step_of_the_run_are_refused(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Launch]
) -> None:
    run = config(tmp_path / "run", optim={"accum_iter": 2, "max_steps": 3})
    train(run)
    longer = config(tmp_path / "run", optim={"accum_iter": 2, "max_steps": 9})
    (tmp_path / "run" / "config.yaml").write_text(dump_config(longer))
    submitted(run.output_dir)
    attempted(run.output_dir, "failed")
    slurm.says(GONE)
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
def test_flags_of_resume_arrive(dry_run: str, tmp_path: Path, slurm: FakeSlurm, typed: Typed) -> None:
    submitted(tmp_path)
    slurm.says(GONE)
    line = f"jobs resume {tmp_path} --cluster local --nodes=1 --gpus-per-node 0 --tasks_per_node=3"
    printed = typed(line, dry_run).out
    assert printed.endswith(f"\n\nagain: {tmp_path}\n\n--cluster local: 3 processes on this machine\n")
    assert "  tasks_per_node     3                      --tasks_per_node\n" in printed


def test_a_job_that_was_told_to_stop_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    files = submitted(tmp_path, job_id="7")
    slurm.says("COMPLETING", "COMPLETING", "COMPLETED")
    monkeypatch.setattr(stopping, "EVERY", 0.0)
    stopping.wait_for_stops(tmp_path)  # it ends for another reason: nobody waits
    assert capsys.readouterr().err == ""
    files.stop_request("7").touch()
    stopping.wait_for_stops(tmp_path)
    assert capsys.readouterr().err == "graftvit: waiting for job 7, which was told to stop, to end\n"


@pytest.mark.parametrize("words", [[], ["--dry_run"], ["--unchecked"]])
def test_a_folder_of_submission_that_is_gone_is_not_replaced_by_the_present_one(
    words: list[str], tmp_path: Path, slurm: FakeSlurm, sent: list[Launch], typed: Typed
) -> None:
    away = tmp_path / "a b"
    submitted(tmp_path / "run", directory=str(away))
    slurm.says(GONE)
    line = f"jobs resume {tmp_path}/run --cluster local --gpus_per_node 0"
    said = typed(line, *words, code=2).err
    assert f"was submitted from {away}, which is not there any more" in said
    assert f"`mkdir -p '{away}'`" in said
    assert not sent
    away.mkdir()
    typed(line, *words)
    assert Path.cwd() == away


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_in_another_folder_is_resumed_there(
    slurm: FakeSlurm, sent: list[Launch], tmp_path: Path, how: str
) -> None:
    """The settings that were frozen with it name the folder where it was."""
    old, new = tmp_path / "old", tmp_path / "new"
    frozen = old / "jobs" / "config.yaml"
    old.mkdir()
    own: dict[str, Any] = {"output_dir": str(old), "inode": old.stat().st_ino, "directory": str(tmp_path)}
    submitted(old, command=["train", str(frozen)], **own)
    frozen.write_text(dump_config(config(old)))
    attempted(old, "stopped")
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new)
        shutil.rmtree(old)
    slurm.says(GONE)
    resume(find_unfinished(new), ClusterConfig(cluster="debug", gpus_per_node=0), unchecked=True)
    (request,) = sent[0].requests
    there = ["train", str(new / "jobs" / "config.yaml"), "--output_dir", str(new)]
    assert (request.words, request.output_dir) == (there, new)


def listed(root: Path, *names: str) -> list[Path]:
    """Runs in the list, each with a job that has the number of its place."""
    folders = [root / name for name in names]
    for place, folder in enumerate(folders):
        submitted(folder, job_id=str(place))
        remember(folder)
    return folders


def test_a_run_is_forgotten_until_it_is_submitted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    one, two, gone = listed(tmp_path, "one", "two", "gone")
    gone.rename(tmp_path / "elsewhere")
    slurm.says("COMPLETED")
    monkeypatch.chdir(tmp_path)
    assert typed("jobs", "forget", "one", gone).out == f"forgotten: one\nforgotten: {gone}\n"
    assert known() == [two]
    assert (one / "jobs").is_dir()
    assert f"{one} is not in the list of runs" in typed("jobs", "forget", one, code=2).err
    remember(one)
    assert known() == [two, one]


def test_a_run_with_a_job_stays(tmp_path: Path, slurm: FakeSlurm, typed: Typed) -> None:
    ended, active = listed(tmp_path, "ended", "active")
    slurm.says({"1": "RUNNING"})
    stays = f"{active} is job 1, and stays in the list: `graftvit jobs stop {active}` ends it"
    assert stays in typed("jobs", "forget", active, code=2).err
    assert typed("jobs forget --ended").out == f"forgotten: {ended}\n"
    assert known() == [active]
    assert "no run in the list has ended" in typed("jobs forget --ended").out


@pytest.mark.parametrize("line", ["jobs forget", "jobs forget run --ended"])
def test_what_to_forget_must_be_clear(line: str, typed: Typed) -> None:
    assert "give either the runs to forget, or --ended" in typed(line, code=2).err


def test_one_run_under_two_names_is_listed_once(tmp_path: Path, slurm: FakeSlurm, typed: Typed) -> None:
    (one,) = listed(tmp_path, "one")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    detour = tmp_path / "deep" / ".." / "one"
    remember(detour)
    assert known() == [one]
    with registry_file().open("a") as file:
        file.write(f"{tmp_path}/link/../../one\n")  # as it was written before; the text alone leads elsewhere
    assert known() == [one]
    slurm.says("COMPLETED")
    typed("jobs", "forget", detour)
    assert known() == []
