"""Commands that are no runs, submitted: their words are checked first, and their jobs are found again."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from graftvit.launch import cli
from graftvit.launch.cli import COMMANDS, main
from graftvit.launch.flags import command_parser, split_words
from graftvit.launch.slurm.job_folder import read_order
from graftvit.launch.slurm.jobs import describe_run
from graftvit.launch.slurm.jobs_text import describe
from graftvit.launch.slurm.requests import plan_work
from graftvit.launch.slurm.setting_layers import add_cluster_flags
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.submitted import SUBMITTED, Interrupted, check_words, ended_by_signals
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.engine import early_signals
from graftvit.transfer.engine.early_signals import remembering
from support.files.data_sets import write_classes
from support.runs.engine_runs import make_teacher
from support.slurm.slurm_folders import submitted

VIT = "vit_tiny_patch16_224"
LOCAL = ClusterConfig(cluster="local", gpus_per_node=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
        ("convert teacher --out new", "the following arguments are required: --plan"),
        ("convert teacher --plan *:linaer --out new", "did you mean 'linear'"),
        ("convert teacher --plan *:linear --out teacher", "already holds a model"),
        ("convert teacher --plan *:linear --out new --calibrate 4", "--calibrate 4 needs images"),
        ("convert teacher --plan *:linear --out new --calibrate 4 --data_path gone", "gone does not exist"),
        ("convert teacher --plan *:linear", "--out is missing"),
        ("export teacher out.pt2 --opset 18", "opset 18 is of ONNX"),
        ("export gone/it out.pt2", "gone/it"),
        ("benchmark", "unknown action ''; valid: "),
        ("benchmark operators --operators linaer", "did you mean 'linear'"),
        ("benchmark models gone/it --plan *:linear", "gone/it"),
        ("layers teacher", "--teacher is missing"),
        ("layers teacher --teacher gone/it --dataset digits", "gone/it"),
        ("data gone", "gone"),
        ("data digits --images 0", "--images 0: must be at least 1"),
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
        ("convert teacher --plan *:linear --out new --calibrate 4 --dataset digits", "new", 1),
        ("export teacher out.pt2", "out.pt2", 1),
        ("benchmark operators --operators linear --tokens 16", "benchmark", 1),
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
    assert [(request.words, request.output_dir) for request in plan.requests] == [
        (words.split(), plan.folder)
    ]
    assert config.cpus_per_task == cores
    order = read_order(plan.folder)
    assert order is not None
    assert order.output == (None if output is None else str(folder / output))


def test_what_lies_on_the_nodes_alone_is_not_looked_for(folder: Path) -> None:
    for words in (
        "evaluate /node/run --data_path /node/data --metrics top1",
        "convert /node/model --plan *:linear --out new",
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
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_teacher(folder / "teacher")
    for name in ("check_commands", "check_cluster"):
        monkeypatch.setattr(f"graftvit.launch.slurm.preview.{name}", lambda *arguments, **more: "")
    monkeypatch.setattr("graftvit.launch.slurm.requests.check_folder", lambda *arguments: None)
    words = ["submit", "evaluate", "teacher", "--dataset", "digits", "--gpus_per_node", "0", "--dry_run"]
    assert main([*words, "--tasks_per_node", "2", "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert "graftvit evaluate teacher --dataset digits --workers 1\n" in shown
    assert "#SBATCH --ntasks-per-node=2" in shown
    assert "#SBATCH --cpus-per-task=2" in shown
    assert f"jobs and log in {folder / 'runs' / 'evaluate-teacher'}" in shown
    assert not (folder / "runs").exists()


def test_it_runs_and_jobs_tells_where_its_output_lies(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    make_teacher(folder / "teacher")
    words = ["submit", "export", "teacher", "out.pt2", "--cluster", "debug", "--gpus_per_node", "1"]
    with remembering():  # so that the handlers of the job do not stay
        assert main(words) == 0
    capsys.readouterr()
    assert (folder / "out.pt2").is_file()
    status = describe_run(folder / "runs" / "export-teacher")
    assert (status.state, status.output) == ("finished", str(folder / "out.pt2"))
    shown = describe(status)
    assert "command   graftvit export teacher out.pt2\n" in shown
    assert f"output    {folder / 'out.pt2'}, and what it printed: `graftvit logs " in shown
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
