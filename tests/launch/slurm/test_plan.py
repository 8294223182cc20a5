"""What is submitted: frozen files say what the user wrote, words are checked first, what is left is found."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.flags import command_parser, split_words
from graftvit.launch.load_config import dump_config, load_comparison, load_config, load_stages, parse_override
from graftvit.launch.slurm import jobs, submit
from graftvit.launch.slurm.attempt import Task
from graftvit.launch.slurm.batch import Batch
from graftvit.launch.slurm.folder import JobFolder, read_output
from graftvit.launch.slurm.jobs import describe_runs
from graftvit.launch.slurm.jobs_text import describe
from graftvit.launch.slurm.plan import (
    asked_before,
    dependency_on,
    plan_again,
    plan_run,
    plan_work,
    unfinished,
)
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.scheduler import State
from graftvit.launch.slurm.site_file import add_cluster_flags
from graftvit.launch.slurm.site_file import describe as describe_asked
from graftvit.launch.slurm.submit import check, preview, send
from graftvit.launch.sweep import load_sweep
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.engine.early_signals import remembering
from graftvit.transfer.engine.train import train
from support.files.data_sets import write_classes
from support.runs.compare_runs import write_config, write_config_with_teacher
from support.runs.engine_runs import config, make_teacher
from support.runs.typed import Typed
from support.slurm.cluster_users import LOCAL, asked, planned
from support.slurm.slurm_folders import HERE, FakeSlurm, attempted, submitted
from support.slurm.sweep_folders import make_sweep

GONE = State()
STAGES = {
    "output_dir": "out",
    "data": {"dataset": "digits"},
    "student": {"model": "vit_tiny_patch16_224", "init": "teacher", "plan": "*: linear"},
    "teacher": {"source": "vit_tiny_patch16_224"},
    "stages": [
        {"name": "align", "mode": "align", "optim": {"epochs": 1}},
        {"name": "task", "mode": "transfer", "optim": {"epochs": 2}},
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def frozen_plan(recipe: str | None, *words: str, sweep: Sequence[str] = ()) -> Batch:
    """What would be submitted, with its files."""
    plan = planned(recipe, *words, sweep=sweep)
    plan.write()
    return plan


def test_a_run_is_frozen_with_all_its_settings(folder: Path) -> None:
    plan = frozen_plan("cifar10_distill", "output_dir=out", "seed=7")
    frozen = folder / "out" / "jobs" / "config.yaml"
    (task,) = plan.tasks
    assert (task.words, task.output_dir) == (["train", str(frozen)], folder / "out")
    assert load_config(frozen) == load_config("cifar10_distill", ["seed=7", f"output_dir={folder / 'out'}"])
    assert plan.configs == [load_config(frozen)]


@pytest.mark.parametrize("sweep", [[], ["seed=0..1"]])
def test_a_restart_goes_on_with_a_run_that_was_told_to_begin_anew(folder: Path, sweep: list[str]) -> None:
    words = ("digits_scratch", "output_dir=out", "engine.resume=never")
    (*_, last) = frozen_plan(*words, sweep=sweep).tasks
    assert load_config(last.words[1]).engine.resume == "auto"
    (last.output_dir / "log.jsonl").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        frozen_plan(*words, sweep=sweep)


def test_stages_stay_stages(folder: Path) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump(STAGES))
    (task,) = frozen_plan("mine.yaml", "optim.blr=0.5").tasks
    expected = load_stages("mine.yaml", ["optim.blr=0.5", f"output_dir={folder / 'out'}"])
    assert load_stages(task.words[1]) == expected
    assert [stage.config.optim.epochs for stage in expected] == [1, 2]


def test_what_is_checked_of_a_sweep_is_its_first_cell(folder: Path) -> None:
    plan = frozen_plan(
        None, "output_dir=out", "dataset=folder", sweep=["data.data_path=/data/a,/data/b", "seed=3..4"]
    )
    assert [task.output_dir.name for task in plan.tasks] == [
        "data_path=data-a,seed=3", "data_path=data-a,seed=4", "data_path=data-b,seed=3", "data_path=data-b,seed=4",
    ]  # fmt: skip
    (first,) = plan.configs
    assert (first.data.data_path, first.seed) == ("/data/a", 3)
    assert first == load_config(plan.tasks[0].words[1])
    assert load_sweep(folder / "out") == plan.sweep


def test_cells_that_have_finished_are_left_out(folder: Path) -> None:
    def plan(*words: str) -> Batch:
        return frozen_plan("digits_scratch", "output_dir=out", *words, sweep=["seed=0..2"])

    cells = [task.output_dir for task in plan().tasks]
    attempted(cells[0], "finished")
    attempted(cells[1], "failed")
    again = plan()
    assert [task.output_dir for task in again.tasks] == cells[1:]
    assert "left out: 1 of 3 cells, which have finished\n" in preview(again, unchecked=True)[0]
    attempted(cells[1], "finished")
    attempted(cells[2], "finished")
    with pytest.raises(ConfigError, match=r"all 3 cells of .*out have finished: `graftvit jobs summary"):
        plan()
    longer = plan("optim.epochs=9")  # whether these can go on is for the run to say
    assert [task.output_dir for task in longer.tasks] == cells


def test_a_cell_of_a_comparison_is_a_job(folder: Path) -> None:
    path = write_config(folder, {"linear": "*: linear"})
    plan = frozen_plan(str(path), "engine.device=cpu", "data.workers=1", "seed=5")
    frozen, cells = folder / "out" / "jobs" / "config.yaml", ["teacher-8", "uniform-8", "linear-8"]
    assert plan.first is None
    for task, name in zip(plan.tasks, cells, strict=True):
        assert task.output_dir == folder / "out" / "cells" / name
        taken = ["--engine.device=cpu", "--data.workers=1"]
        assert task.words == ["compare", str(frozen), *taken, "--cell", name]
    assert same_numbers(path, frozen, "seed=5", "data.workers=1")


def same_numbers(path: Path, frozen: Path, *words: str) -> bool:
    """Whether cells of the one count as done for the other."""
    one, other = load_comparison(path, map(parse_override, words)), load_comparison(frozen)
    return [one.digest(cell) for cell in one.cells()] == [other.digest(cell) for cell in other.cells()]


@pytest.mark.parametrize("name", ["teacher.yaml", "recipes/teacher.yaml", "config.yaml"])
def test_the_teacher_is_frozen_beside_the_comparison(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config_with_teacher(folder, name)
    plan = frozen_plan(str(path))
    frozen = folder / "out" / "jobs" / "config.yaml"
    assert plan.first is not None
    assert plan.first.output_dir == folder / "out" / "teacher"
    assert plan.first.words == ["compare", str(frozen), "--only", "teacher"]
    assert plan.configs == [load_comparison(path).teacher]  # the comparison has no teacher to be checked with
    assert same_numbers(path, frozen)
    if name != "config.yaml":
        (folder / name).unlink()
        (folder / "elsewhere").mkdir()
        monkeypatch.chdir(folder / "elsewhere")
        assert load_comparison(frozen).teacher == plan.configs[0]


def test_an_impossible_comparison_writes_nothing(folder: Path) -> None:
    path = write_config(folder, {"linear": "0-9: linear"})
    with pytest.raises(ConfigError, match=r"compare.plans: linear at 8 px: .*9"):
        frozen_plan(str(path))
    with pytest.raises(ConfigError, match="--sweep does not go with"):
        frozen_plan(str(path), sweep=["seed=0..3"])
    assert not (folder / "out").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cluster": "local", "nodes": 2}, "--nodes is 2: --cluster local is this machine alone; give --nodes 1"),
    ({"cluster": "debug", "gpus_per_node": 2}, "this process alone, and 2 are asked for"),
    ({"cluster": "local", "gpus_per_node": 2}, "a cell of a comparison is one process, and 1 x 2 are asked"),
    ({"cluster": "local"}, "--cluster local does not wait for the teacher"),
    ({"cluster": "local", "array_parallelism": 2}, "--array_parallelism is 2: --cluster local starts all 3"),
]


def test_what_is_checked_and_shown_of_a_comparison_with_a_teacher(folder: Path) -> None:
    path = str(write_config_with_teacher(folder, "teacher.yaml"))
    plan = plan_run(path, [], [], Request(**HERE))
    for resources, sentence in REFUSED:
        with pytest.raises(ConfigError, match=sentence):
            check(replace(plan, request=Request(**resources)))
    text, problem = preview(plan)
    assert problem is None
    assert f"makes the teacher first, in {folder}/out/teacher" in text
    assert "3 cells, 16 at a time:\n  teacher-8\n  uniform-8\n  linear-8\n" in text
    assert not (folder / "out").exists()
    student = folder / "out" / "teacher" / "student"
    student.mkdir(parents=True)
    (student / "config.json").touch()
    assert plan_run(path, [], [], LOCAL).first is None, "a teacher that is there is not made again"


def test_what_has_a_job_is_not_submitted_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm
) -> None:
    path = str(write_config_with_teacher(folder, "teacher.yaml"))
    plan = plan_run(path, [], [], Request(gpus_per_node=0))
    monkeypatch.setattr(submit, "check_commands", lambda: None)
    for place, where in enumerate(("teacher", "cells/linear-8")):
        submitted(folder / "out" / where, job_id=f"12_{place}")
        slurm.says({f"12_{place}": "PENDING"})
        why = f"{where} is job 12_{place} already: .*graftvit jobs stop {folder}/out"
        with pytest.raises(ConfigError, match=why):
            check(plan, unchecked=True)
    slurm.says("PREEMPTED")
    check(plan, unchecked=True)


VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("evaluate teacher --metrcs top1", "unknown flag '--metrcs', did you mean '--metrics'?"),
        ("evaluate runs/gone --dataset digits", "runs/gone"),
        ("evaluate teacher --data_path gone", "data.data_path=gone does not exist"),
        ("evaluate teacher --dataset digits --json gone/out.json", "its folder does not exist"),
        ("convert teacher --plan *:linear --output_dir teacher", "already holds a model"),
        ("convert teacher --plan *:linear --output_dir x --calibrate 4 --data_path gone", "gone does not"),
        ("convert teacher --plan *:linear", "--output_dir is missing"),
        ("export teacher out.pt2 --opset 18", "opset 18 is of ONNX"),
        ("benchmark operators --operators linaer", "did you mean 'linear'"),
        ("benchmark models gone/it --plan *:linear", "gone/it"),
        ("hybrid gone/it --macs 0.9 --dataset digits --output_dir mix", "gone/it"),
        ("data digits --images 0", "--images: give a whole number, 1 or more"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(folder: Path, words: str, sentence: str) -> None:
    make_teacher(folder / "teacher")
    with pytest.raises(GraftError, match=re.escape(sentence)):
        plan_work(words.split(), folder / "jobs_here", LOCAL)
    kept = {"teacher", "xdg"}  # the settings of libraries, which the first import may write
    assert {path.name for path in folder.iterdir()} <= kept


@pytest.mark.parametrize(
    ("words", "output", "cores"),
    [
        ("evaluate teacher --dataset digits --workers 3 --json out.json", "out.json", 4),
        ("convert teacher --plan *:linear --output_dir new --calibrate 4 --dataset digits", "new", 1),
        ("export teacher out.pt2", "out.pt2", 1),
        ("benchmark operators --operators linear --tokens 16", "benchmark/operators", 1),
        ("hybrid teacher --macs 0.9 --dataset digits --workers 1 --output_dir mix", "mix", 2),
        ("data images --out look.png", "look.png", 1),
    ],
)
def test_right_words_become_a_request(folder: Path, words: str, output: str | None, cores: int) -> None:
    make_teacher(folder / "teacher")
    write_classes(folder / "images", ["a"])
    plan = plan_work(words.split(), None, LOCAL)
    plan.write()
    command, first = words.split()[:2]
    assert plan.folder == folder / "runs" / f"{command}-{first}"
    (task,) = plan.tasks
    assert (task.words, task.output_dir) == (words.split(), plan.folder)
    assert plan.cores == cores
    assert read_output(plan.folder) == ("" if output is None else str(folder / output))


def test_what_lies_on_the_nodes_alone_is_not_looked_for(folder: Path) -> None:
    for words in (
        "evaluate /node/run --data_path /node/data --metrics top1",
        "convert /node/model --plan *:linear --output_dir new",
        "export /node/model out.pt2",
        "hybrid /node/teacher --student own=/node/own --data_path /node/data --output_dir new",
        "benchmark models /node/model --plan *:linear",
        "data /node/data",
    ):
        plan_work(words.split(), folder / "here", LOCAL, unchecked=True)
        with pytest.raises(GraftError, match="/node/"):
            plan_work(words.split(), folder / "here", LOCAL)


def test_a_command_of_one_process_is_not_given_several(folder: Path) -> None:
    several = Request(nodes=2, gpus_per_node=0)
    with pytest.raises(ConfigError, match=r"`graftvit export` is one process, and 2 x 1 are asked for"):
        plan_work(["export", VIT, "out.pt2"], None, several)
    make_teacher(folder / "teacher")
    plan_work(["evaluate", "teacher", "--dataset", "digits"], None, several, unchecked=True)


def test_the_folder_of_a_run_is_refused(folder: Path) -> None:
    make_teacher(folder / "teacher")
    submitted(folder / "run")
    with pytest.raises(ConfigError, match="holds a run, with jobs of its own"):
        plan_work(["export", "teacher", "out.pt2"], folder / "run", LOCAL)


def test_searches_of_programs_and_of_hybrids_are_divided(folder: Path) -> None:
    search = ["programs", "search", VIT, "--dataset", "digits", "--output_dir", "found"]
    shares = plan_work(search, None, LOCAL, shares=2, unchecked=True)
    assert [task.words[-2:] for task in shares.tasks] == [["--share", "1/2"], ["--share", "2/2"]]
    assert [task.output_dir.parent for task in shares.tasks] == [shares.folder / "cells"] * 2
    hybrid = ["hybrid", VIT, "--macs", "0.9", "--dataset", "digits", "--output_dir", "mix"]
    assert len(plan_work(hybrid, None, LOCAL, shares=3, unchecked=True).tasks) == 3
    for words, count in ((search, 0), (["export", VIT, "out.pt2"], 2)):
        with pytest.raises(ConfigError, match=f"--shares {count}: "):
            plan_work(words, None, LOCAL, shares=count, unchecked=True)


def test_flags_of_the_cluster_are_taken_out_wherever_they_stand() -> None:
    parser = command_parser("submit", "", ())
    add_cluster_flags(parser)
    plan = ["--plan", "*: linear", "-1: keep"]
    words = ["models", "a", "--nodes", "2", *plan, "--mem=4G", "--img-size", "224", "--unchecked", "448"]
    own, others = split_words(parser, [*words, "--cpus-per-task", "3"])
    assert own == ["--nodes", "2", "--mem=4G", "--unchecked", "--cpus-per-task", "3"]
    assert others == ["models", "a", *plan, "--img-size", "224", "448"]


def test_the_dry_run_shows_the_script_and_writes_nothing(
    folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(folder / "teacher")
    for name in ("check_commands", "check_folder", "_ask_sbatch"):
        monkeypatch.setattr(submit, name, lambda *arguments: "")
    line = "submit evaluate teacher --dataset digits --gpus_per_node 0 --dry_run"
    shown = typed(line, "--tasks_per_node", "2", "--workers", "1").out
    assert "graftvit evaluate teacher --dataset digits --workers 1\n" in shown
    assert "#SBATCH --ntasks-per-node=2" in shown
    assert "#SBATCH --cpus-per-task=2" in shown
    assert f"jobs and log in {folder / 'runs' / 'evaluate-teacher'}" in shown
    assert not (folder / "runs").exists()


def test_it_runs_and_jobs_tells_where_its_output_lies(folder: Path, typed: Typed) -> None:
    make_teacher(folder / "teacher")
    with remembering():  # so that the handlers of the job do not stay
        typed("submit export teacher out.pt2 --cluster debug --gpus_per_node 1")
    assert (folder / "out.pt2").is_file()
    status = describe_runs([folder / "runs" / "export-teacher"])[0]
    assert status.state == "finished"
    assert read_output(status.run) == str(folder / "out.pt2")
    shown = describe(status)
    assert "command   graftvit export teacher out.pt2\n" in shown
    assert f"output    {folder / 'out.pt2'}, and what it printed: `graftvit jobs logs " in shown
    text = json.loads((status.run / "jobs" / "command.json").read_text())
    assert text["words"] == ["export", "teacher", "out.pt2"]
    submitted(status.run, cluster="local")  # a run is not taken for the command that its folder had before
    attempted(status.run, "finished")
    (run,) = json.loads(typed("jobs --json", status.run).out)
    assert (run["state"], run["command"], run["output"]) == ("finished", "", "")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Batch]:
    """What would have gone to the cluster; the jobs are 100, 200, ..."""
    monkeypatch.chdir(tmp_path)  # for `resume` goes to where the run was submitted from
    found: list[Batch] = []

    def order(batch: Batch) -> list[str]:
        found.append(batch)
        cells = [f"{len(found)}00_{place}" for place in range(len(batch.tasks))]
        return cells if batch.is_array else [f"{len(found)}00"]

    monkeypatch.setattr(submit, "submit", order)
    monkeypatch.setattr(submit, "first_word", lambda *_: "")
    return found


def resume(folder: Path, **resources: Any) -> str:
    """What is said of all that is left, after it was submitted again without a check."""
    left = unfinished(folder)
    return send(plan_again(folder, left, Request(**resources)))


@pytest.mark.parametrize("last", [[], [None], ["failed"], ["finished", "failed"], ["requeued", "finished"]])
def test_a_run_is_left_until_its_last_attempt_finishes(
    tmp_path: Path, last: list[str | None], slurm: FakeSlurm
) -> None:
    submitted(tmp_path)
    for outcome in last:
        attempted(tmp_path, outcome)
    for state in ("PENDING", "COMPLETING", "REQUEUED", "FAILED", "PREEMPTED", "UNKNOWN"):
        slurm.says(state)
        if last[-1:] == ["finished"]:
            with pytest.raises(ConfigError, match=f"{tmp_path} has finished: there is nothing to resume"):
                unfinished(tmp_path)
        elif state in ("PENDING", "COMPLETING", "REQUEUED"):
            with pytest.raises(ConfigError, match=f"is job 12 already: `graftvit jobs {tmp_path}` shows it"):
                unfinished(tmp_path)
        else:
            assert list(unfinished(tmp_path)) == [tmp_path]


def test_cells_that_failed_and_have_no_job_go_again_as_they_were_submitted(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Batch]
) -> None:
    cells = make_sweep(tmp_path, "seed=0..4")
    asked = Request(
        gpus_per_node=4, dependency="afterok:3", mem="9G", sbatch={"kill_on_invalid_dep": "yes", "nice": 5}
    )
    own = {"resources": asked.model_dump(mode="json"), "cpus_per_task": 6, "directory": str(tmp_path)}
    outcomes = ("finished", "failed", "", "stopped", None)
    for place, (cell, outcome) in enumerate(zip(cells, outcomes, strict=True)):
        submitted(cell, job_id=f"5_{place}", **own)
        if outcome != "":
            attempted(cell, outcome)
    slurm.says("RUNNING")
    with pytest.raises(ConfigError, match="is job 5 already"):
        unfinished(tmp_path)
    slurm.says({"5_2": "RUNNING"})
    left = unfinished(tmp_path)
    assert list(left) == [cells[1], cells[3], cells[4]]
    # the job that was waited for may be forgotten by now, and would be refused
    again = Request.model_validate(asked_before(left))
    assert again == asked.model_copy(update={"dependency": None, "sbatch": {"nice": 5}})
    said = send(plan_again(tmp_path, left, again))
    (batch,) = sent
    assert [task.output_dir for task in batch.tasks] == list(left)
    assert batch.tasks[0].words == ["train", str(cells[1] / "config.yaml")]
    assert (batch.cores, batch.folder, batch.request, batch.again) == (6, tmp_path, again, True)
    assert said.startswith(f"submitted job 100 (3 cells) in {tmp_path}\n")


def test_the_teacher_of_a_comparison_is_made_again_only_if_it_is_not_there(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Batch]
) -> None:
    teacher, cells = tmp_path / "teacher", [tmp_path / "cells" / name for name in ("linear-8", "uniform-8")]
    submitted(
        teacher, job_id="7", command=["compare", "c.yaml", "--only", "teacher"], directory=str(tmp_path)
    )
    cells[0].mkdir(parents=True)
    for outcome in (None, "finished"):
        attempt = attempted(teacher, outcome)
        slurm.says(GONE)
        with pytest.raises(ConfigError, match=r"the cells of .* were never submitted"):
            unfinished(tmp_path)
    JobFolder(teacher).attempt_path(attempt).unlink()
    for place, cell in enumerate(cells):
        words = ["compare", "c.yaml", "--cell", cell.name]
        submitted(cell, job_id=f"8_{place}", command=words, directory=str(tmp_path))
    for states in ("PENDING", {"7": "PENDING"}):
        slurm.says(states)
        with pytest.raises(ConfigError, match="is job 7 already"):
            unfinished(tmp_path)
    attempted(teacher, "failed")
    slurm.says(GONE)
    said = resume(tmp_path)
    first, rest = sent
    assert (first.tasks, first.after) == ([Task(["compare", "c.yaml", "--only", "teacher"], teacher)], None)
    assert ([task.output_dir for task in rest.tasks], rest.after) == (cells, "100")
    assert said.startswith(f"submitted job 200 (2 cells), after job 100 for the teacher, in {tmp_path}\n")
    for folder in (teacher, cells[0]):
        attempted(folder, "finished")
    assert f"submitted job 300 (1 cell) in {tmp_path}\n" in resume(tmp_path)
    assert [task.output_dir for task in sent[-1].tasks] == cells[1:]
    attempted(cells[1], "finished")
    with pytest.raises(ConfigError, match="has finished"):
        unfinished(tmp_path)


def test_processes_that_cannot_share_the_step_of_the_run_are_refused(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Batch]
) -> None:
    run = config(tmp_path / "run", optim={"accum_iter": 2, "max_steps": 3})
    train(run)
    longer = config(tmp_path / "run", optim={"accum_iter": 2, "max_steps": 9})
    (tmp_path / "run" / "config.yaml").write_text(dump_config(longer))
    submitted(run.output_dir)
    attempted(run.output_dir, "failed")
    slurm.says(GONE)
    left = unfinished(run.output_dir)

    def here(processes: int) -> Batch:
        request = Request(cluster="local", gpus_per_node=0, tasks_per_node=processes)
        return plan_again(run.output_dir, left, request)

    with pytest.raises(ConfigError, match="which 3 processes cannot share: use 1 or 2 processes"):
        check(here(3))
    text, problem = preview(here(2))
    assert problem is None
    assert "16 x 1 accumulated x 2 processes = 32 images" in text
    assert "after step 3" in text
    assert text.endswith(f"again: {run.output_dir}\n\n--cluster local: 2 processes on this machine\n")
    check(here(3), unchecked=True)
    assert f"job 100 in {run.output_dir}" in send(here(2))
    assert [batch.request.tasks for batch in sent] == [2]


def test_a_folder_of_submission_that_is_gone_is_not_replaced_by_the_present_one(
    tmp_path: Path, slurm: FakeSlurm, sent: list[Batch], typed: Typed
) -> None:
    away = tmp_path / "a b"
    submitted(tmp_path / "run", directory=str(away))
    slurm.says(GONE)
    line = f"jobs resume {tmp_path}/run --cluster local --gpus_per_node 0"
    assert f"was submitted from {away}, which is not there any more" in typed(line, code=2).err
    assert not sent
    away.mkdir()
    printed = typed(line, "--tasks_per_node=3", "--dry-run").out
    assert printed.endswith(f"\n\nagain: {tmp_path}/run\n\n--cluster local: 3 processes on this machine\n")
    assert "  tasks_per_node     3                      --tasks_per_node\n" in printed
    assert not sent
    typed(line, "--unchecked")
    assert Path.cwd() == away
    assert sent


def test_jobs_of_runs_and_of_all_cells_of_a_sweep_are_waited_for(tmp_path: Path, slurm: FakeSlurm) -> None:
    submitted(tmp_path / "run", job_id="7")
    for place, cell in enumerate(make_sweep(tmp_path / "sweep", "seed=0..2")):
        submitted(cell, job_id=f"9_{place}")
        if place == 1:
            attempted(cell, "finished")
    slurm.says(dict.fromkeys(("7", "9_0", "9_2"), "RUNNING"))
    found = asked("--after", f"{tmp_path}/run", "--dependency=singleton", f"--after={tmp_path}/sweep")
    wanted = "singleton,afterok:7:9_0:9_2"
    assert (found.dependency, found.sbatch) == (wanted, {"kill_on_invalid_dep": "yes"})
    assert f"  dependency         {wanted} --after\n" in describe_asked(found)


@pytest.mark.parametrize("state", ["PENDING", "REQUEUED", "FAILED"])
@pytest.mark.parametrize("outcome", ["failed", None, "finished"])
def test_only_what_may_still_finish_is_waited_for(
    outcome: str | None, state: str, tmp_path: Path, slurm: FakeSlurm
) -> None:
    run = tmp_path / "a run"
    submitted(run)
    attempted(run, outcome)
    slurm.says(state)
    why = f"--after {run}: {run} has neither finished nor a job that could: .*graftvit jobs resume '{run}'"
    if state != "FAILED":
        assert dependency_on([run])["dependency"] == "afterok:12"
    elif outcome == "finished":
        assert dependency_on([run]) == {}  # nothing is left to wait for
    else:
        with pytest.raises(ConfigError, match=why):
            dependency_on([run])


def test_what_slurm_has_no_job_of_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(tmp_path / "local", cluster="local", job_id="4321")
    monkeypatch.setattr(jobs, "is_alive", lambda job: True)
    for name, why in {"local": "Slurm cannot wait for", "": "never submitted", "x": "no folder"}.items():
        with pytest.raises(ConfigError, match=why):
            dependency_on([tmp_path / name])
