"""Jobs of runs whose records are not whole: what is taken for whose."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from graftvit.launch.cli import main
from graftvit.launch.slurm import jobs, lookup, stopping
from graftvit.launch.slurm.batch import Request, job_name
from graftvit.launch.slurm.job_folder import JobFolder, listed, registry_file, remember
from graftvit.launch.slurm.lock import FILE, submitting
from graftvit.launch.slurm.lookup import NamedJob, find_submissions, home
from graftvit.launch.slurm.requests import SubmissionPlan
from graftvit.launch.slurm.scheduler import JobState, NoAnswerError
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.stopping import find_unfinished
from graftvit.launch.slurm.submission import _refuse_second
from graftvit.models.errors import ConfigError, GraftError
from support.slurm.slurm_folders import submitted


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


def queue(monkeypatch: pytest.MonkeyPatch, *jobs: NamedJob) -> None:
    monkeypatch.setattr(lookup, "queued_jobs", lambda: list(jobs))
    monkeypatch.setattr(lookup.shutil, "which", lambda _: "/usr/bin/squeue")


def array_of(sweep: Path, launch: str = "launch-0") -> list[NamedJob]:
    script = sweep / "jobs" / launch / "submit.sh"
    return [NamedJob(f"7_{index}", job_name(sweep), script, 1.0) for index in range(2)]


def test_a_number_that_never_came_back_is_written_down(monkeypatch: pytest.MonkeyPatch, sweep: Path) -> None:
    cells = sorted((sweep / "cells").iterdir())
    queue(monkeypatch, *array_of(sweep))
    assert [[one.job_id for one in known] for known in find_submissions(cells).values()] == [["7_0"], ["7_1"]]
    queue(monkeypatch)
    assert [one.job_id for one in find_submissions(cells[1:])[cells[1]]] == ["7_1"]


def test_what_never_came_to_a_job_is_left_out(monkeypatch: pytest.MonkeyPatch, sweep: Path) -> None:
    cell = sweep / "cells" / "a"
    queue(monkeypatch, *array_of(sweep, "launch-of-another-submission"))
    assert find_submissions([cell])[cell] == []
    with FileLock(sweep / FILE):  # another command submits it at this moment
        assert [one.job_id for one in find_submissions([cell])[cell]] == [""]
    with submitting(sweep):  # this one does, and what it finds was left by one that was killed
        assert find_submissions([cell])[cell] == []
    queue(monkeypatch)
    monkeypatch.setattr(lookup, "is_ordered", lambda script: script.name == "submit.sh")  # by an orphan
    assert len(find_submissions([cell])[cell]) == 1
    assert len(JobFolder(cell).submissions()) == 1


def test_a_cell_without_records_is_told_from_the_others(monkeypatch: pytest.MonkeyPatch, sweep: Path) -> None:
    cell = sweep / "cells" / "b"
    shutil.rmtree(cell / "jobs")
    queue(monkeypatch, *array_of(sweep))
    (found,) = find_submissions([cell])[cell]
    assert (found.job_id, found.cluster, found.logs) == ("7_1", "slurm", str(sweep / "jobs" / "logs"))
    assert home(cell) == sweep
    assert find_submissions([cell], by_name=False)[cell] == []


def test_slurm_is_not_asked_of_a_folder_that_nothing_was_submitted_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sweep: Path
) -> None:
    def silent() -> list[NamedJob]:
        raise GraftError("Slurm does not answer")

    queue(monkeypatch)
    monkeypatch.setattr(lookup, "queued_jobs", silent)
    assert find_submissions([tmp_path])[tmp_path] == []
    with pytest.raises(GraftError, match="does not answer"):
        find_submissions([sweep / "cells" / "a"])


def test_a_job_whose_order_got_no_answer_may_still_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = tmp_path / "jobs" / "launch-0"
    launch.mkdir(parents=True)
    submitted(tmp_path, job_id="", launch=str(launch), submitted=time.time())
    queue(monkeypatch)
    assert find_submissions([tmp_path])[tmp_path] == []
    (launch / lookup.UNSURE).touch()
    assert [one.job_id for one in find_submissions([tmp_path])[tmp_path]] == [""]
    monkeypatch.setattr(lookup, "LATE", 0.0)
    assert find_submissions([tmp_path])[tmp_path] == []
    queue(monkeypatch, NamedJob("7", job_name(tmp_path), launch / "submit.sh", 1.0))
    assert [one.job_id for one in find_submissions([tmp_path])[tmp_path]] == ["7"]


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
    assert [one.job_id for one in JobFolder(cell).submissions()] == ["7_3"]
    assert JobFolder(copy / "cells" / "a").submissions() == []
    (tmp_path / "link").symlink_to(sweep)
    assert [one.job_id for one in JobFolder(tmp_path / "link" / "cells" / "a").submissions()] == ["7_3"]
    shutil.rmtree(copy)
    sweep.rename(tmp_path / "moved")
    (found,) = JobFolder(tmp_path / "moved" / "cells" / "a").submissions()
    assert (found.job_id, found.logs) == ("7_3", str(tmp_path / "moved" / "jobs" / "logs"))


def test_a_run_of_this_machine_is_not_let_into_the_folder_of_a_job_without_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with submitting(tmp_path):
        pass
    plan = SubmissionPlan(tmp_path, [], {}, [Request(["train"], tmp_path)])
    config = ClusterConfig(cluster="local")
    queue(monkeypatch, NamedJob("7", job_name(tmp_path), tmp_path / "jobs" / "launch-0" / "submit.sh", 1.0))
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState("RUNNING")))
    with pytest.raises(ConfigError, match="is job 7 already"):
        _refuse_second(plan, config)

    def silent() -> list[NamedJob]:
        raise NoAnswerError("Slurm does not answer")

    monkeypatch.setattr(lookup, "queued_jobs", silent)
    _refuse_second(plan, config)  # which needs no Slurm
    with pytest.raises(NoAnswerError):
        _refuse_second(plan, ClusterConfig())


def job_of(folder: Path) -> NamedJob:
    return NamedJob("7", job_name(folder), folder / "jobs" / "launch-0" / "submit.sh", 1.0)


def test_the_job_of_a_folder_that_is_gone_is_still_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    gone, ended, here = tmp_path / "gone", tmp_path / "ended", tmp_path / "here"
    here.mkdir()
    queue(monkeypatch, job_of(gone), replace(job_of(ended), job_id="6"))
    states = {"7": JobState("RUNNING"), "6": JobState("FAILED")}
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: {job: states[job] for job in ids})
    for folder in (ended, gone, here):
        remember(folder)
    assert jobs.listed_runs() == [gone, here]
    assert jobs.run_folders(gone) == [gone]
    status = jobs.describe_run(gone)
    assert (status.job_id, status.state, status.why) == ("7", "running", f"starting; {jobs.GONE}")
    plan = SubmissionPlan(gone, [], {}, [Request(["train"], gone)])
    with pytest.raises(ConfigError, match="is job 7 already"):
        _refuse_second(plan, ClusterConfig())
    told: list[str] = []
    monkeypatch.setattr(stopping, "cancel", told.append)
    assert main(["stop", str(gone)]) == 0
    assert told == ["7"]
    assert f"job 7 of {gone} was running and is cancelled; {jobs.GONE}" in capsys.readouterr().out
    assert not gone.exists()
    with pytest.raises(ConfigError, match=r"ended is no folder: give the output_dir of a run$"):
        jobs.run_folders(ended)


def test_the_job_of_a_run_whose_records_were_removed_is_known_and_what_goes_on_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    left = tmp_path / "left"
    (left / "checkpoints").mkdir(parents=True)  # what `rm -rf` leaves of a run that writes meanwhile
    queue(monkeypatch, job_of(left))
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState("RUNNING")))
    assert jobs.describe_run(left).job_id == "7"
    sent: list[str] = []
    monkeypatch.setattr(stopping, "signal_job", lambda job, _: sent.append(job))
    assert main(["stop", str(left)]) == 0
    assert f"`graftvit submit {left}` resumes it" in capsys.readouterr().out
    assert sent == ["7"]
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState("COMPLETED")))
    with pytest.raises(ConfigError, match=f"no record of how it was submitted: `graftvit submit {left}`"):
        find_unfinished(left)


def test_a_living_job_that_the_records_do_not_tell_of_is_known_beside_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    submitted(run, job_id="6")  # as an older copy of the folder has it
    queue(
        monkeypatch,
        replace(job_of(run), job_id="6"),
        job_of(run),
        replace(job_of(run), job_id="5", state="FAILED"),
    )
    assert [one.job_id for one in find_submissions([run])[run]] == ["6", "7"]
    (path,) = (run / "jobs" / "submissions").iterdir()
    path.write_text("")  # cut by a crash
    assert [one.job_id for one in find_submissions([run])[run]] == ["6", "7", "5"]


def test_a_run_that_holds_another_in_its_cells_keeps_its_own_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    queue(monkeypatch)
    submitted(tmp_path / "run", job_id="6")
    submitted(tmp_path / "run" / "cells" / "inner", job_id="7")
    assert jobs.run_folders(tmp_path / "run") == [tmp_path / "run", tmp_path / "run" / "cells" / "inner"]


def test_a_signal_that_could_not_be_sent_leaves_no_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = submitted(tmp_path / "run", job_id="7")
    queue(monkeypatch)
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState("RUNNING")))

    def fail(*_: object) -> None:
        raise NoAnswerError("Slurm does not answer")

    monkeypatch.setattr(stopping, "signal_job", fail)
    assert main(["stop", str(tmp_path / "run")]) == 1
    assert not files.asked_to_stop("7")
    assert jobs.describe_run(tmp_path / "run").state == "running"


def test_the_job_of_a_removed_run_is_not_forgotten_while_slurm_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    gone = tmp_path / "gone"
    remember(gone)

    def silent() -> list[NamedJob]:
        raise NoAnswerError("Slurm does not answer")

    queue(monkeypatch)
    monkeypatch.setattr(lookup, "queued_jobs", silent)
    assert main(["forget", str(gone)]) == 2
    assert listed() == [gone]


def test_a_mistyped_folder_is_told_the_nearest_and_that_slurm_was_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "teacher").mkdir()
    queue(monkeypatch)
    meant = re.escape(f"techer is no folder: did you mean '{tmp_path / 'teacher'}'?")
    with pytest.raises(ConfigError, match=f"{meant}$"):
        jobs.run_folders(tmp_path / "techer")

    def failing(error: GraftError) -> None:
        def fail() -> list[NamedJob]:
            raise error

        monkeypatch.setattr(lookup, "queued_jobs", fail)

    failing(NoAnswerError("Slurm does not answer"))
    with pytest.raises(ConfigError, match=f"{meant}; Slurm does not answer$"):
        jobs.run_folders(tmp_path / "techer")
    failing(GraftError("squeue failed: no configuration"))  # Slurm's commands, and no cluster
    with pytest.raises(ConfigError, match=f"{meant}$"):
        jobs.run_folders(tmp_path / "techer")


@pytest.mark.parametrize("command", ["jobs", "stop", "logs", "resume", "forget", "summary"])
def test_an_empty_name_is_not_the_folder_that_one_is_in(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, ""]) == 2
    assert "'' is not a folder: give the folder of a run or of a sweep" in capsys.readouterr().err


def test_a_list_whose_last_line_was_cut_keeps_the_next_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    remember(tmp_path / "a")
    registry_file().write_text(registry_file().read_text().rstrip())
    remember(tmp_path / "b\u2028c")
    assert listed() == [tmp_path / "a", tmp_path / "b\u2028c"]


def test_a_run_is_not_submitted_into_the_cells_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(monkeypatch)
    submitted(tmp_path / "run", job_id="6")
    for inner in (tmp_path / "run" / "cells" / "x", tmp_path / "run" / "teacher"):
        with pytest.raises(ConfigError, match="which was submitted as a whole"):
            _refuse_second(SubmissionPlan(inner, [], {}, [Request(["train"], inner)]), ClusterConfig())
    beside = tmp_path / "other" / "teacher"
    _refuse_second(SubmissionPlan(beside, [], {}, [Request(["train"], beside)]), ClusterConfig())


def test_a_copy_of_a_run_that_was_moved_afterwards_does_not_own_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    submitted(run, output_dir=str(run), inode=run.stat().st_ino)
    shutil.copytree(run, tmp_path / "copy")
    run.rename(tmp_path / "moved")
    queue(monkeypatch)
    monkeypatch.setattr(jobs, "job_states", lambda ids, **_: dict.fromkeys(ids, JobState("RUNNING")))
    assert jobs.describe_run(tmp_path / "moved").active
    assert not jobs.describe_run(tmp_path / "copy").active
    assert list(find_unfinished(tmp_path / "copy").submissions) == [tmp_path / "copy"]
