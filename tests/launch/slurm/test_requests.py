"""What is submitted: frozen files say what the user wrote, and words of commands are checked first."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch import cli
from graftvit.launch.cli import COMMANDS
from graftvit.launch.flags import command_parser, split_words
from graftvit.launch.load_config import load_comparison, load_config, load_stages, parse_override
from graftvit.launch.slurm import submission
from graftvit.launch.slurm.job_folder import JobFolder, read_order
from graftvit.launch.slurm.jobs import describe_run
from graftvit.launch.slurm.jobs_text import describe
from graftvit.launch.slurm.preview import preview
from graftvit.launch.slurm.requests import SubmissionPlan, plan_run, plan_work
from graftvit.launch.slurm.setting_layers import add_cluster_flags
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.submission import check
from graftvit.launch.slurm.sweep import load_sweep
from graftvit.launch.submitted import SUBMITTED, Interrupted, check_words, ended_by_signals
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.early_signals import remembering
from support.files.data_sets import write_classes
from support.runs.compare_runs import write_config
from support.runs.engine_runs import make_teacher
from support.runs.typed import Typed
from support.slurm.slurm_folders import HERE, FakeSlurm, attempted, submitted

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


def planned(recipe: str | None, *words: str, sweep: list[str] | None = None) -> SubmissionPlan:
    plan = plan_run(recipe, [parse_override(word) for word in words], sweep or [])
    plan.write()
    return plan


def with_teacher(folder: Path, name: str) -> Path:
    """A comparison whose teacher is made by the recipe `name`, a file beside it."""
    path = write_config(folder, {"linear": "*: linear"})
    whole = yaml.safe_load(path.read_text())
    del whole["teacher"]
    student = {key: value for key, value in whole["student"].items() if key != "init"}
    recipe = {"mode": "scratch", "student": student, "data": whole["data"]}
    recipe["optim"] = {"epochs": 1, "warmup_epochs": 0}
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(recipe))
    whole["compare"]["teacher_recipe"] = name
    path.write_text(yaml.safe_dump(whole))
    return path


def test_a_run_is_frozen_with_all_its_settings(folder: Path) -> None:
    plan = planned("cifar10_distill", "output_dir=out", "seed=7")
    frozen = folder / "out" / "jobs" / "config.yaml"
    (request,) = plan.requests
    assert (request.words, request.output_dir) == (["train", str(frozen)], folder / "out")
    assert load_config(frozen) == load_config("cifar10_distill", ["seed=7", f"output_dir={folder / 'out'}"])
    assert plan.configs == [load_config(frozen)]


@pytest.mark.parametrize("sweep", [[], ["seed=0..1"]])
def test_a_restart_goes_on_with_a_run_that_was_told_to_begin_anew(folder: Path, sweep: list[str]) -> None:
    words = ("digits_scratch", "output_dir=out", "engine.resume=never")
    (*_, last) = planned(*words, sweep=sweep).requests
    assert load_config(last.words[1]).engine.resume == "auto"
    (last.output_dir / "log.jsonl").touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        planned(*words, sweep=sweep)


def test_stages_stay_stages(folder: Path) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump(STAGES))
    (request,) = planned("mine.yaml", "optim.blr=0.5").requests
    expected = load_stages("mine.yaml", ["optim.blr=0.5", f"output_dir={folder / 'out'}"])
    assert load_stages(request.words[1]) == expected
    assert [stage.config.optim.epochs for stage in expected] == [1, 2]


def test_what_is_checked_of_a_sweep_is_its_first_cell(folder: Path) -> None:
    plan = planned(
        None, "output_dir=out", "dataset=folder", sweep=["data.data_path=/data/a,/data/b", "seed=3..4"]
    )
    assert [request.output_dir.name for request in plan.requests] == [
        "data_path=data-a,seed=3", "data_path=data-a,seed=4", "data_path=data-b,seed=3", "data_path=data-b,seed=4",
    ]  # fmt: skip
    (first,) = plan.configs
    assert (first.data.data_path, first.seed) == ("/data/a", 3)
    assert first == load_config(plan.requests[0].words[1])
    assert load_sweep(folder / "out") == plan.sweep


def test_cells_that_have_finished_are_left_out(folder: Path) -> None:
    def plan(*words: str) -> SubmissionPlan:
        return planned("digits_scratch", "output_dir=out", *words, sweep=["seed=0..2"])

    cells = [request.output_dir for request in plan().requests]
    attempted(cells[0], "finished")
    attempted(cells[1], "failed")
    again = plan()
    assert [request.output_dir for request in again.requests] == cells[1:]
    local = ClusterConfig(cluster="local", nodes=1, gpus_per_node=0)
    assert "left out: 1 of 3 cells, which have finished\n" in preview(again, local, unchecked=True).text
    attempted(cells[1], "finished")
    attempted(cells[2], "finished")
    with pytest.raises(ConfigError, match=r"all 3 cells of .*out have finished: `graftvit jobs summary"):
        plan()
    longer = plan("optim.epochs=9")  # whether these can go on is for the run to say
    assert [request.output_dir for request in longer.requests] == cells


def test_a_cell_of_a_comparison_is_a_job(folder: Path) -> None:
    path = write_config(folder, {"linear": "*: linear"})
    plan = planned(str(path), "engine.device=cpu", "data.workers=1", "seed=5")
    frozen, cells = folder / "out" / "jobs" / "config.yaml", ["teacher-8", "uniform-8", "linear-8"]
    assert plan.first is None
    for request, name in zip(plan.requests, cells, strict=True):
        assert request.output_dir == folder / "out" / "cells" / name
        taken = ["--engine.device=cpu", "--data.workers=1"]
        assert request.words == ["compare", str(frozen), *taken, "--cell", name]
    assert same_numbers(path, frozen, "seed=5", "data.workers=1")


def same_numbers(path: Path, frozen: Path, *words: str) -> bool:
    """Whether cells of the one count as done for the other."""
    one, other = load_comparison(path, map(parse_override, words)), load_comparison(frozen)
    return [one.digest(cell) for cell in one.cells()] == [other.digest(cell) for cell in other.cells()]


@pytest.mark.parametrize("name", ["teacher.yaml", "recipes/teacher.yaml", "config.yaml"])
def test_the_teacher_is_frozen_beside_the_comparison(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_teacher(folder, name)
    plan = planned(str(path))
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


def test_a_teacher_that_is_there_is_not_made_again(folder: Path) -> None:
    path = with_teacher(folder, "teacher.yaml")
    student = folder / "out" / "teacher" / "student"
    student.mkdir(parents=True)
    (student / "config.json").touch()
    assert plan_run(str(path), [], []).first is None


def test_an_impossible_comparison_writes_nothing(folder: Path) -> None:
    path = write_config(folder, {"linear": "0-9: linear"})
    with pytest.raises(ConfigError, match=r"compare.plans: linear at 8 px: .*9"):
        planned(str(path))
    with pytest.raises(ConfigError, match="--sweep does not go with"):
        planned(str(path), sweep=["seed=0..3"])
    assert not (folder / "out").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cluster": "local", "nodes": 2}, "--nodes is 2: --cluster local is this machine alone; give --nodes 1"),
    ({"cluster": "debug", "gpus_per_node": 2}, "this process alone, and 2 are asked for"),
    ({"cluster": "local", "gpus_per_node": 2}, "a cell of a comparison is one process, and 1 x 2 are asked"),
    ({"cluster": "local"}, "--cluster local does not wait for the teacher"),
    ({"cluster": "local", "array_parallelism": 2}, "--array_parallelism is 2: --cluster local starts all 3"),
]


@pytest.mark.parametrize(("resources", "sentence"), REFUSED)
def test_what_a_cluster_cannot_do_is_refused(folder: Path, resources: dict[str, Any], sentence: str) -> None:
    plan = plan_run(str(with_teacher(folder, "teacher.yaml")), [], [])
    with pytest.raises(ConfigError, match=sentence):
        check(plan, ClusterConfig(**resources))


def test_a_dry_run_tells_of_the_teacher_and_the_cells(folder: Path) -> None:
    plan = plan_run(str(with_teacher(folder, "teacher.yaml")), [], [])
    text = preview(plan, ClusterConfig(**HERE)).text
    assert f"makes the teacher first, in {folder}/out/teacher" in text
    assert "3 cells, 16 at a time:\n  teacher-8\n  uniform-8\n  linear-8\n" in text
    assert not (folder / "out").exists()


@pytest.mark.parametrize("where", ["teacher", "cells/linear-8"])
def test_what_has_a_job_is_not_submitted_again(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch, slurm: FakeSlurm
) -> None:
    plan = plan_run(str(with_teacher(folder, "teacher.yaml")), [], [])
    submitted(folder / "out" / where, job_id="12_1")
    monkeypatch.setattr(submission, "check_commands", lambda: None)
    slurm.says("PENDING")
    with pytest.raises(ConfigError, match=f"{where} is job 12_1 already: .*graftvit jobs stop {folder}/out"):
        check(plan, ClusterConfig(gpus_per_node=0), unchecked=True)
    slurm.says("PREEMPTED")
    check(plan, ClusterConfig(gpus_per_node=0), unchecked=True)
    assert JobFolder(folder / "out" / where).submission() is not None


VIT = "vit_tiny_patch16_224"
LOCAL = ClusterConfig(cluster="local", gpus_per_node=0)


def test_each_is_a_command_that_can_check_its_words() -> None:
    for command in SUBMITTED:
        assert command in COMMANDS
        with pytest.raises(GraftError):
            check_words(command, ["--no_such_flag", "1"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("evaluate", "the following arguments are required: CHECKPOINT"),
        ("evaluate teacher --metrcs top1", "unknown flag '--metrcs', did you mean '--metrics'?"),
        ("evaluate teacher --metrics top2 --dataset digits", "'top2' is not a metric"),
        ("evaluate teacher --metrics distance --dataset digits", "needs a model to measure from"),
        ("evaluate runs/gone --dataset digits", "runs/gone"),
        ("evaluate teacher --data_path gone", "data.data_path=gone does not exist"),
        ("evaluate teacher --dataset digits --json gone/out.json", "its folder does not exist"),
        ("convert teacher --output_dir new", "the following arguments are required: --plan"),
        ("convert teacher --plan *:linaer --output_dir new", "did you mean 'linear'"),
        ("convert teacher --plan *:linear --output_dir teacher", "already holds a model"),
        ("convert teacher --plan *:linear --output_dir new --calibrate 4", "--calibrate 4 needs images"),
        (
            "convert teacher --plan *:linear --output_dir new --calibrate 4 --data_path gone",
            "gone does not exist",
        ),
        ("convert teacher --plan *:linear", "--output_dir is missing"),
        ("export teacher out.pt2 --opset 18", "opset 18 is of ONNX"),
        ("export gone/it out.pt2", "gone/it"),
        ("benchmark", "unknown action ''; valid: "),
        ("benchmark operators --operators linaer", "did you mean 'linear'"),
        ("benchmark models gone/it --plan *:linear", "gone/it"),
        ("layers teacher", "--teacher is missing"),
        ("layers teacher --teacher gone/it --dataset digits", "gone/it"),
        ("data gone", "gone"),
        ("data digits --images 0", "--images: give a whole number, 1 or more"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(folder: Path, words: str, sentence: str) -> None:
    make_teacher(folder / "teacher")
    with pytest.raises(GraftError, match=re.escape(sentence)):
        plan_work(words.split(), folder / "jobs_here", LOCAL)
    assert sorted(path.name for path in folder.iterdir()) == ["teacher"]


@pytest.mark.parametrize(
    ("words", "output", "cores"),
    [
        ("evaluate teacher --dataset digits --workers 3 --json out.json", "out.json", 4),
        ("evaluate teacher --dataset digits --workers 0", None, 1),
        ("convert teacher --plan *:linear --output_dir new --calibrate 4 --dataset digits", "new", 1),
        ("export teacher out.pt2", "out.pt2", 1),
        ("benchmark operators --operators linear --tokens 16", "benchmark/operators", 1),
        ("layers teacher --teacher teacher --dataset digits --workers 1", None, 2),
        ("data images --out look.png", "look.png", 1),
    ],
)
def test_right_words_become_a_request(folder: Path, words: str, output: str | None, cores: int) -> None:
    make_teacher(folder / "teacher")
    write_classes(folder / "images", ["a"])
    plan, config = plan_work(words.split(), None, LOCAL)
    plan.write()
    command, first = words.split()[:2]
    assert plan.folder == folder / "runs" / f"{command}-{first}"
    (request,) = plan.requests
    assert (request.words, request.output_dir) == (words.split(), plan.folder)
    assert config.cpus_per_task == cores
    order = read_order(plan.folder)
    assert order is not None
    assert order.output == (None if output is None else str(folder / output))


def test_what_lies_on_the_nodes_alone_is_not_looked_for(folder: Path) -> None:
    for words in (
        "evaluate /node/run --data_path /node/data --metrics top1",
        "convert /node/model --plan *:linear --output_dir new",
        "export /node/model out.pt2",
        "layers /node/student --teacher /node/teacher --data_path /node/data",
        "benchmark models /node/model --plan *:linear",
        "data /node/data",
    ):
        plan_work(words.split(), folder / "here", LOCAL, unchecked=True)
        with pytest.raises(GraftError, match="/node/"):
            plan_work(words.split(), folder / "here", LOCAL)


def test_a_command_of_one_process_is_not_given_several(folder: Path) -> None:
    several = ClusterConfig(nodes=2, gpus_per_node=0)
    with pytest.raises(ConfigError, match=r"`graftvit export` is one process, and 2 x 1 are asked for"):
        plan_work(["export", VIT, "out.pt2"], None, several)
    make_teacher(folder / "teacher")
    plan_work(["evaluate", "teacher", "--dataset", "digits"], None, several, unchecked=True)


def test_the_folder_of_a_run_is_refused(folder: Path) -> None:
    make_teacher(folder / "teacher")
    words = ["export", "teacher", "out.pt2"]
    submitted(folder / "run")
    with pytest.raises(ConfigError, match="holds a run, with jobs of its own"):
        plan_work(words, folder / "run", LOCAL)


def test_flags_of_the_cluster_are_taken_out_wherever_they_stand() -> None:
    parser = command_parser("submit", "", ())
    add_cluster_flags(parser)
    words = [
        "models",
        "a",
        "--nodes",
        "2",
        "--plan",
        "*: linear",
        "-1: keep",
        "--mem=4G",
        "--img-size",
        "224",
    ]
    own, others = split_words(parser, [*words, "--unchecked", "448", "--cpus-per-task", "3"])
    assert own == ["--nodes", "2", "--mem=4G", "--unchecked", "--cpus-per-task", "3"]
    assert others == ["models", "a", "--plan", "*: linear", "-1: keep", "--img-size", "224", "448"]


def test_the_dry_run_shows_the_script_and_writes_nothing(
    folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(folder / "teacher")
    for name in ("check_commands", "check_cluster"):
        monkeypatch.setattr(f"graftvit.launch.slurm.preview.{name}", lambda *arguments, **more: "")
    monkeypatch.setattr("graftvit.launch.slurm.requests.check_folder", lambda *arguments: None)
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
    status = describe_run(folder / "runs" / "export-teacher")
    assert (status.state, status.output) == ("finished", str(folder / "out.pt2"))
    shown = describe(status)
    assert "command   graftvit export teacher out.pt2\n" in shown
    assert f"output    {folder / 'out.pt2'}, and what it printed: `graftvit jobs logs " in shown
    text = json.loads((status.folder / "jobs" / "command.json").read_text())
    assert text["words"] == ["export", "teacher", "out.pt2"]


def test_a_run_is_not_taken_for_the_command_that_its_folder_had_before(folder: Path) -> None:
    (folder / "run" / "jobs").mkdir(parents=True)
    (folder / "run" / "jobs" / "command.json").write_text('{"words": ["export"], "output": "/x"}')
    submitted(folder / "run", cluster="local")
    status = describe_run(folder / "run")
    assert (status.command, status.output) == ("", "")


@pytest.mark.parametrize("number", early_signals.EARLY_SIGNALS)
def test_a_signal_of_the_scheduler_ends_a_command_at_once(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []

    def run(words: list[str]) -> int:
        reached.append("begun")
        try:
            os.kill(os.getpid(), number)
            reached.append("went on")
        finally:
            reached.append("cleaned up")
        return 0

    monkeypatch.setattr(cli, "_run", run)
    with remembering():
        assert cli.dispatch(["export", "a", "b"]) == 128 + number
        assert early_signals.received == [number]
        assert cli.dispatch(["export", "a", "b"]) == 128 + number, "it came before the command began"
    assert reached == ["begun", "cleaned up"]


def test_outside_of_a_job_signals_are_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_loader_process_leaves_the_end_to_its_parent() -> None:
    with remembering(), ended_by_signals():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(7)
            except Interrupted:
                os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
