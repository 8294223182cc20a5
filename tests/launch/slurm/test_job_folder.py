"""The files of jobs and attempts, and whose job is whose where they are not whole."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from graftvit.launch.slurm import jobs, lookup, stopping
from graftvit.launch.slurm.batch import Request, job_name
from graftvit.launch.slurm.failures import Failure
from graftvit.launch.slurm.job_folder import JobFolder, listed, newest_state, registry_file, remember
from graftvit.launch.slurm.lock import FILE, submitting
from graftvit.launch.slurm.lookup import NamedJob, find_submissions, home
from graftvit.launch.slurm.requests import SubmissionPlan
from graftvit.launch.slurm.scheduler import NoAnswerError
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.stopping import find_unfinished
from graftvit.launch.slurm.submission import _refuse_second
from graftvit.models.errors import CheckpointError, ConfigError, GraftError
from support.runs.typed import Typed
from support.slurm.slurm_folders import SILENT, FakeSlurm, job_of, submitted


def begin(folder: JobFolder, restart: int = 0, job_id: str = "7") -> str:
    return folder.begin(job_id=job_id, restart=restart, nodes=[], world_size=1)


def test_names_carry_number_job_and_restart(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    first, second = (begin(folder, restart, "70_1") for restart in (0, 1))
    assert (first, second) == ("0001-70_1.0", "0002-70_1.1")
    folder.write_failure(second, Failure(3, "cause", False, "boom"))
    assert (tmp_path / "jobs" / "errors" / "0002-70_1.1-3.txt").exists()
    found = [(one.number, one.name, one.restart) for one in folder.attempts()]
    assert found == [(1, first, 0), (2, second, 1)]


def test_failures_are_those_of_one_attempt_and_causes_come_first(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    name, other = begin(folder), begin(folder, 1)
    for rank, kind in ((0, "consequence"), (2, "cause"), (11, "consequence")):
        folder.write_failure(name, Failure(rank, kind, True, "boom"))  # type: ignore[arg-type]
    assert [failure.rank for failure in folder.failures(name)] == [2, 0, 11]
    assert folder.failures(other) == []


def test_records_of_before_are_read(tmp_path: Path) -> None:
    for name in ("attempts", "errors"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    begun = (
        '{"started": 1.0, "job_id": "7", "restart": 0, "nodes": [], "world_size": 4, "of_a_later_version": 1}'
    )
    (tmp_path / "jobs" / "attempts" / "0001.jsonl").write_text(begun + '\n{"outcome": "failed"}\n')
    (tmp_path / "jobs" / "errors" / "0001-3.txt").write_text("boom\n")
    folder = JobFolder(tmp_path)
    (old,) = folder.attempts()
    assert (old.number, old.name, old.outcome, old.state) == (1, "0001", "failed", None)
    assert begin(folder, 1) == "0002-7.1"
    assert [(failure.rank, failure.text) for failure in folder.failures(old.name)] == [(3, "boom\n")]


def test_what_is_noted_after_a_cut_line_is_read(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    name = begin(folder)
    with folder.attempt_path(name).open("a") as file:
        file.write('{"signal": "SIGUSR')
    folder.note(name, outcome="finished", ended=9.0)
    assert folder.finished
    folder.attempt_path(name).write_text("7\n[]\n" + folder.attempt_path(name).read_text())
    assert folder.finished


@pytest.mark.parametrize("place", ["checkpoints", "0-recover/checkpoints", "cells/a/checkpoints"])
def test_the_newest_state_changes_with_each_save_and_not_with_a_rename(tmp_path: Path, place: str) -> None:
    assert newest_state(tmp_path) == ""
    last = tmp_path / place / "last.safetensors"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"1")
    first = newest_state(tmp_path)
    last.replace(last.with_name("previous.safetensors"))
    assert newest_state(tmp_path) == first != ""
    last.write_bytes(b"2")
    assert newest_state(tmp_path) != first


KEPT = ("targets.txt", "fit/layer01.safetensors", "0-recover/fit/layer00.safetensors")
BY_COMMANDS = ("fit/layer01.safetensors", "cells/000-001/cell.json")


@pytest.mark.parametrize(
    "place", [*(f"run/{each}" for each in KEPT), *(f"out/{each}" for each in BY_COMMANDS)]
)
def test_what_is_kept_before_the_first_step_counts_as_saved(tmp_path: Path, place: str) -> None:
    """In the run folder, or where a command writes."""
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    order = {"words": ["convert"], "output": str(tmp_path / "out")}
    (tmp_path / "run" / "jobs" / "command.json").write_text(json.dumps(order))
    assert newest_state(tmp_path / "run") == ""
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    assert newest_state(tmp_path / "run") != ""


def test_a_request_to_stop_is_for_one_job_and_one_of_before_for_all(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.folder.mkdir()
    folder.stop_request("7").touch()
    assert (folder.asked_to_stop("7"), folder.asked_to_stop("8")) == (True, False)
    folder.stop_path.touch()
    assert folder.asked_to_stop("8")


def test_a_run_folder_that_is_gone_stays_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    files = JobFolder(run)
    name = begin(files)
    shutil.rmtree(run / "jobs")
    files.note(name, outcome="failed")  # `jobs/` is made anew
    shutil.rmtree(run)
    writes: list[Callable[[], object]] = [
        lambda: files.note(name, outcome="failed"),
        lambda: files.write_failure(name, Failure(0, "cause", False, "boom")),
    ]
    for write in writes:
        with pytest.raises(FileNotFoundError):
            write()
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attempts/0001-1.0.jsonl", b"5"),
        ("attempts/0001-1.0.jsonl", b'{"started": 1, "job_id": "7"}'),
        ("attempts/0001-1.0.jsonl", b"\377\376\n"),
        ("attempts/0001 (copy).jsonl", b"{}"),
        ("submissions/0001 (conflicted copy).json", b"{}"),
        ("submissions/0001.json", b""),
        ("submissions/0001.json", b"\377\376"),
    ],
)
def test_files_that_nobody_of_ours_wrote_are_passed_by(tmp_path: Path, name: str, content: bytes) -> None:
    folder = JobFolder(tmp_path)
    path = tmp_path / "jobs" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert (folder.attempts(), folder.submissions(), folder.finished) == ([], [], False)
    folder.withdraw_submission("launch-0")
    attempt = begin(folder)
    assert [one.name for one in folder.attempts()] == [attempt]
    submitted(tmp_path)
    assert [one.job_id for one in folder.submissions()] == ["12"]


@pytest.mark.parametrize("damaged", ['{"job_id": "13"}', "[1]", "[]", "7", "null", "{"])
def test_a_damaged_record_is_skipped_and_named(tmp_path: Path, damaged: str) -> None:
    files = submitted(tmp_path)
    (files.folder / "submissions" / "0002.json").write_text(damaged)
    assert [one.job_id for one in files.submissions()] == ["12"]
    with pytest.raises(CheckpointError, match=r"0002.json is damaged"):
        files.submission()


def test_a_record_of_somebody_else_names_no_file_elsewhere(tmp_path: Path) -> None:
    files = submitted(tmp_path / "run", job_id="/../../../victim")
    assert files.submissions() == []
    with pytest.raises(CheckpointError, match=r"'/../../../victim' is no name of a file"):
        files.submission()


def test_a_list_whose_last_line_was_cut_keeps_the_next_run(tmp_path: Path) -> None:
    remember(tmp_path / "a")
    registry_file().write_text(registry_file().read_text().rstrip())
    remember(tmp_path / "b\u2028c")
    assert listed() == [tmp_path / "a", tmp_path / "b\u2028c"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two cells of which the scheduler was told, and whose number never came back."""
    folder = tmp_path / "sweep"
    launch = folder / "jobs" / "launch-0"
    launch.mkdir(parents=True)
    cells = [folder / "cells" / name for name in ("a", "b")]
    (launch / "runs.json").write_text(json.dumps([str(cell) for cell in cells]))
    with submitting(folder):
        for index, cell in enumerate(cells):
            submitted(cell, job_id="", launch=str(launch), index=index)
    return folder


def array_of(sweep: Path, launch: str = "launch-0") -> list[NamedJob]:
    script = sweep / "jobs" / launch / "submit.sh"
    return [NamedJob(f"7_{index}", job_name(sweep), script, 1.0) for index in range(2)]


def ids(folder: Path) -> list[str]:
    return [one.job_id for one in find_submissions([folder])[folder]]


def refuse_second(folder: Path, **asked: str) -> None:
    _refuse_second(SubmissionPlan(folder, [], {}, [Request(["train"], folder)]), ClusterConfig(**asked))


def test_a_number_that_never_came_back_is_written_down(slurm: FakeSlurm, sweep: Path) -> None:
    cells = sorted((sweep / "cells").iterdir())
    slurm.queue(*array_of(sweep))
    assert [[one.job_id for one in known] for known in find_submissions(cells).values()] == [["7_0"], ["7_1"]]
    slurm.queue()
    assert ids(cells[1]) == ["7_1"]


def test_what_never_came_to_a_job_is_left_out(
    monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm, sweep: Path
) -> None:
    cell = sweep / "cells" / "a"
    slurm.queue(*array_of(sweep, "launch-of-another-submission"))
    assert ids(cell) == []
    with FileLock(sweep / FILE):  # another command submits it at this moment
        assert ids(cell) == [""]
    with submitting(sweep):  # this one does, and what it finds was left by one that was killed
        assert ids(cell) == []
    slurm.queue()
    monkeypatch.setattr(lookup, "is_ordered", lambda script: script.name == "submit.sh")  # by an orphan
    assert len(ids(cell)) == len(JobFolder(cell).submissions()) == 1


def test_a_cell_without_records_is_told_from_the_others(slurm: FakeSlurm, sweep: Path) -> None:
    cell = sweep / "cells" / "b"
    shutil.rmtree(cell / "jobs")
    slurm.queue(*array_of(sweep))
    (found,) = find_submissions([cell])[cell]
    assert (found.job_id, found.cluster, found.logs) == ("7_1", "slurm", str(sweep / "jobs" / "logs"))
    assert home(cell) == sweep
    assert find_submissions([cell], by_name=False)[cell] == []


def test_slurm_is_not_asked_of_a_folder_that_nothing_was_submitted_to(
    slurm: FakeSlurm, tmp_path: Path, sweep: Path
) -> None:
    slurm.queue(error=GraftError("squeue failed: no configuration"))
    assert ids(tmp_path) == []
    with pytest.raises(GraftError, match="no configuration"):
        ids(sweep / "cells" / "a")


def test_a_job_whose_order_got_no_answer_may_still_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm
) -> None:
    launch = tmp_path / "jobs" / "launch-0"
    launch.mkdir(parents=True)
    submitted(tmp_path, job_id="", launch=str(launch), submitted=time.time())
    slurm.queue()
    assert ids(tmp_path) == []
    (launch / lookup.UNSURE).touch()
    assert ids(tmp_path) == [""]
    monkeypatch.setattr(lookup, "LATE", 0.0)
    assert ids(tmp_path) == []
    slurm.queue(job_of(tmp_path))
    assert ids(tmp_path) == ["7"]


def test_names_with_bars_and_links_are_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a|b c"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert job_name(tmp_path / "link") == job_name(folder)
    assert "|" not in job_name(folder)
    line = f"12_3|RUNNING|2026-11-22T10:00:00|{job_name(folder)}|{folder}/jobs/launch-0/submit.sh|\n"
    monkeypatch.setattr(lookup, "ask", lambda *words: line)
    (job,) = lookup.queued_jobs()
    assert (job.job_id, job.script) == ("12_3", folder / "jobs" / "launch-0" / "submit.sh")


def test_a_copy_of_a_run_has_no_job_and_a_moved_run_keeps_its_own(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    cell, launch = sweep / "cells" / "a", sweep / "jobs" / "launch-0"
    launch.mkdir(parents=True)
    (launch / "job").write_text("7\n")
    places = {"launch": str(launch), "logs": str(sweep / "jobs" / "logs"), "output_dir": str(cell)}
    submitted(cell, job_id="", index=3, **places)
    copy = tmp_path / "copy"
    shutil.copytree(sweep, copy)
    (tmp_path / "link").symlink_to(sweep)
    for way in (cell, tmp_path / "link" / "cells" / "a"):
        assert [one.job_id for one in JobFolder(way).submissions()] == ["7_3"]
    assert JobFolder(copy / "cells" / "a").submissions() == []
    shutil.rmtree(copy)
    sweep.rename(tmp_path / "moved")
    (found,) = JobFolder(tmp_path / "moved" / "cells" / "a").submissions()
    assert (found.job_id, found.logs) == ("7_3", str(tmp_path / "moved" / "jobs" / "logs"))


def test_a_copy_of_a_run_that_was_moved_afterwards_does_not_own_its_job(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    submitted(run, output_dir=str(run), inode=run.stat().st_ino)
    shutil.copytree(run, tmp_path / "copy")
    run.rename(tmp_path / "moved")
    slurm.queue()
    slurm.says("RUNNING")
    assert jobs.describe_run(tmp_path / "moved").active
    assert not jobs.describe_run(tmp_path / "copy").active
    assert list(find_unfinished(tmp_path / "copy").submissions) == [tmp_path / "copy"]


def test_a_run_of_this_machine_is_not_let_into_the_folder_of_a_job_without_records(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    with submitting(tmp_path):
        pass
    slurm.queue(job_of(tmp_path))
    slurm.says("RUNNING")
    with pytest.raises(ConfigError, match="is job 7 already"):
        refuse_second(tmp_path, cluster="local")
    slurm.queue(error=SILENT)
    refuse_second(tmp_path, cluster="local")  # which needs no Slurm
    with pytest.raises(NoAnswerError):
        refuse_second(tmp_path)


def test_the_job_of_a_folder_that_is_gone_is_still_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    gone, ended, here = tmp_path / "gone", tmp_path / "ended", tmp_path / "here"
    here.mkdir()
    slurm.queue(job_of(gone), job_of(ended, "6"))
    slurm.says({"7": "RUNNING", "6": "FAILED"})
    for folder in (ended, gone, here):
        remember(folder)
    assert jobs.listed_runs() == [gone, here]
    assert jobs.run_folders(gone) == [gone]
    status = jobs.describe_run(gone)
    assert (status.job_id, status.state, status.why) == ("7", "running", f"starting; {jobs.GONE}")
    with pytest.raises(ConfigError, match="is job 7 already"):
        refuse_second(gone)
    told: list[str] = []
    monkeypatch.setattr(stopping, "cancel", told.append)
    assert f"job 7 of {gone} was running and is cancelled; {jobs.GONE}" in typed("jobs", "stop", gone).out
    assert told == ["7"]
    assert not gone.exists()
    with pytest.raises(ConfigError, match=r"ended is no folder: give the output_dir of a run$"):
        jobs.run_folders(ended)


def test_the_job_of_a_run_whose_records_were_removed_is_known_and_what_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    run = tmp_path / "left"
    (run / "checkpoints").mkdir(parents=True)  # what `rm -rf` leaves of a run that writes meanwhile
    slurm.queue(job_of(run))
    slurm.says("RUNNING")
    assert jobs.describe_run(run).job_id == "7"
    sent: list[str] = []
    monkeypatch.setattr(stopping, "signal_job", lambda job, _: sent.append(job))
    assert f"`graftvit submit {run}` resumes it" in typed("jobs", "stop", run).out
    assert sent == ["7"]
    slurm.says("COMPLETED")
    with pytest.raises(ConfigError, match=f"no record of how it was submitted: `graftvit submit {run}`"):
        find_unfinished(run)


def test_a_living_job_that_the_records_do_not_tell_of_is_known_beside_them(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    submitted(tmp_path, job_id="6")  # as an older copy of the folder has it
    slurm.queue(job_of(tmp_path, "6"), job_of(tmp_path), job_of(tmp_path, "5", "FAILED"))
    assert ids(tmp_path) == ["6", "7"]
    (path,) = (tmp_path / "jobs" / "submissions").iterdir()
    path.write_text("")  # cut by a crash
    assert ids(tmp_path) == ["6", "7", "5"]


def test_a_run_in_the_cells_of_another_has_a_job_and_takes_no_submission(
    tmp_path: Path, slurm: FakeSlurm
) -> None:
    slurm.queue()
    run, inner = tmp_path / "run", tmp_path / "run" / "cells" / "inner"
    submitted(run, job_id="6")
    for folder in (run / "cells" / "x", run / "teacher"):
        with pytest.raises(ConfigError, match="which was submitted as a whole"):
            refuse_second(folder)
    refuse_second(tmp_path / "other" / "teacher")
    submitted(inner, job_id="7")
    assert jobs.run_folders(run) == [run, inner]


def test_the_job_of_a_removed_run_is_not_forgotten_while_slurm_is_silent(
    tmp_path: Path, slurm: FakeSlurm, typed: Typed
) -> None:
    gone = tmp_path / "gone"
    remember(gone)
    slurm.queue(error=SILENT)
    typed("jobs", "forget", gone, code=2)
    assert listed() == [gone]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, ""),
        (NoAnswerError("Slurm does not answer"), "; Slurm does not answer"),
        (GraftError("squeue failed: no configuration"), ""),  # Slurm's commands, and no cluster
    ],
)
def test_a_mistyped_folder_is_told_the_nearest_and_that_slurm_was_silent(
    error: Exception | None, told: str, slurm: FakeSlurm, tmp_path: Path
) -> None:
    (tmp_path / "teacher").mkdir()
    slurm.queue(error=error)
    meant = re.escape(f"techer is no folder: did you mean '{tmp_path / 'teacher'}'?{told}")
    with pytest.raises(ConfigError, match=f"{meant}$"):
        jobs.run_folders(tmp_path / "techer")
