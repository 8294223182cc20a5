"""What a user meets before anything is queued, what is sent, and what is made of the answer of sbatch."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from graftvit.launch.flags import command_parser, parse_command
from graftvit.launch.load_config import dump_config, parse_override
from graftvit.launch.plan_text import describe_plan
from graftvit.launch.slurm import checks, lock, submission, submit
from graftvit.launch.slurm.batch import Launch, Request
from graftvit.launch.slurm.lock import is_submitting, submitting
from graftvit.launch.slurm.requests import plan_run
from graftvit.launch.slurm.setting_layers import add_cluster_flags, ask, asked_by, describe
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.submission import check_runs, dependency_on, describe_again, refuse_finished
from graftvit.models.errors import ConfigError, GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_teacher
from support.slurm.cluster_users import user_with_recipe, write_site
from support.slurm.slurm_folders import FakeSlurm, attempted, submitted
from support.slurm.sweep_folders import make_sweep

PARTITION = "PartitionName=main Default=YES State=UP MaxTime=12:00:00 MaxNodes=UNLIMITED\n"
NODES = "n1|8|4000|{state}|gpu:4(S:0-1),tmpdisk:100\nn2|8|4000|{state}|gpu:4,tmpdisk:ssd:2K,tmpdisk:100\n"
SLURM = {
    "scontrol": f"case \"$*\" in *partition*) printf '{PARTITION}';; esac\n",
    "sinfo": f"printf '{NODES.format(state='idle')}'\n",
    "sbatch": 'case "$*" in *--test-only*) ;; *) touch "$0.called"; echo 77;; esac\n',
    "squeue": "",
    "sacct": "exit 1\n",
    "srun": "",
}


def write_program(folder: Path, name: str, lines: str) -> None:
    """A command of Slurm that is a script of a shell."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{lines}")
    (folder / name).chmod(0o755)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two nodes, whose state the test may change."""
    told = {"state": "idle"}

    def output(*command: str) -> str:
        if command[0] == "sinfo":
            return NODES.format(**told)
        return PARTITION if "partition" in command else "No reservations in the system\n"

    monkeypatch.setattr(checks, "output", output)
    return told


@pytest.fixture
def user(tmp_path: Path, nodes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a recipe `run.yaml` on a login node, whose Slurm is made of shell scripts."""
    for name, lines in SLURM.items():
        write_program(tmp_path / "bin", name, lines)
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return user_with_recipe(tmp_path, monkeypatch, path, gpus_per_node=0)


def refused(asked: ClusterConfig, cores: int = 1) -> str:
    with pytest.raises(ConfigError) as raised:
        checks.check_resources(asked, cores)
    return str(raised.value)


def python(program: str, *words: str) -> subprocess.Popen[str]:
    """A process that submits; what `program` does comes before. Ctrl-C stops it also below a shell that ignores it."""
    heard = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    text = f"{heard}\nfrom graftvit.launch.cli import main\n{program}\nsys.exit(main({list(words)!r}))"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", text], **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("values", "least"),
    [
        ({"time": "1"}, 3), ({"time": "0:02:00"}, 3), ({"time": 6, "signal_delay": 300}, 7),
        ({"time": 2, "signal_delay": 60}, 3),
    ],
)  # fmt: skip
def test_a_limit_that_leaves_no_time_to_train_is_refused(
    values: dict[str, object], least: int, nodes: dict[str, str]
) -> None:
    said = refused(ClusterConfig.model_validate({"gpus_per_node": 0, **values}))
    assert said.startswith(f"--time is {values['time']}: ")
    assert f"give {least} minutes or more" in said
    assert "--signal_delay" in said
    checks.check_resources(ClusterConfig.model_validate({"gpus_per_node": 0, **values, "time": least}), 1)


ORIGINS: list[tuple[dict[str, str], dict[str, object], str]] = [
    ({"SBATCH_PARTITION": "hihg"}, {}, "SBATCH_PARTITION is hihg: no partition"),
    ({}, {"partition": "hihg"}, "{site}: partition is hihg: no partition"),
    ({}, {"profile": "big", "profiles": {"big": {"nodes": 9}}}, "{site}: profiles.big.nodes is 9: "),
    ({"SBATCH_TIMELIMIT": "1-0"}, {}, "SBATCH_TIMELIMIT is 1-0: partition main allows 12:00:00"),
    ({"SBATCH_TIMELIMIT": "1"}, {}, "SBATCH_TIMELIMIT is 1: "),
    ({"SBATCH_GPUS_PER_NODE": "8"}, {}, "SBATCH_GPUS_PER_NODE is 8: partition main"),
    ({"SBATCH_MEM_PER_NODE": "9G"}, {}, "SBATCH_MEM_PER_NODE is 9216: partition main"),
    ({"SBATCH_MEM_PER_CPU": "9G"}, {}, "SBATCH_MEM_PER_CPU x cores a node is 9216: partition main"),
    ({"SBATCH_GRES": "gpu:9"}, {}, "SBATCH_GRES is gpu:9: partition main"),
    ({}, {"cpus_per_task": 99}, "{site}: cpus_per_task x tasks a node is 99: partition main"),
    ({}, {"time": None}, "--time is 24:00:00 by default: partition main allows"),
]


@pytest.mark.parametrize(("surroundings", "content", "sentence"), ORIGINS)
def test_a_check_names_where_a_value_is_from(
    surroundings: dict[str, str], content: dict[str, object], sentence: str, nodes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    site = {"time": "1:00:00", "gpus_per_node": None if "GPUS" in str(surroundings) else 0, **content}
    path = write_site(**{name: value for name, value in site.items() if value is not None})
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    asked = ask({}).config()
    assert sentence.format(site=path) in refused(asked, asked.cpus_per_task or 1)


@pytest.mark.parametrize("state", ["idle", "drained"])
@pytest.mark.parametrize(
    ("gres", "sentence"),
    [
        ("tmpdisk:500", "--gres is tmpdisk:500: partition main has nodes with up to 2148 tmpdisk, and"),
        ("tmpdisk:3K", "--gres is tmpdisk:3K: partition main has nodes with up to 2148 tmpdisk, and"),
        ("gpu:1,tmpdisk:hdd:1", "partition main has nodes with up to 0 tmpdisk:hdd, and 0 of its 2 nodes"),
    ],
)
def test_other_resources_of_nodes_count_whatever_state_they_are_in(
    gres: str, sentence: str, state: str, nodes: dict[str, str]
) -> None:
    nodes["state"] = state
    asked = ClusterConfig.model_validate({"gres": gres, "time": "1:00:00", "nodes": 2})
    if "gpu" not in gres:
        asked = asked.model_copy(update={"gpus_per_node": "0"})
    assert sentence in refused(asked)
    for enough in ("tmpdisk", "tmpdisk:100", "gpu:4,gres/tmpdisk:50", "none"):
        asked = ClusterConfig.model_validate({"gres": enough, "time": "1:00:00", "nodes": 2})
        checks.check_resources(asked, 1)
        assert ("all 2 nodes" in checks.waits_for(asked, 1)) == (state == "drained")


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--partition hihg", "--time 1", "--output_dir /tmp/nobody", "--help"])
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_what_needs_no_torch_is_told_before_it_is_loaded(user: Path, line: str, dry: list[str]) -> None:
    program = "import atexit\natexit.register(lambda: print('torch loaded:', 'torch' in sys.modules))"
    out, err = python(program, "submit", "run.yaml", *line.split(), *dry).communicate(timeout=600)
    assert "torch loaded: False" in out, err
    assert err.startswith("graftvit: error: ") == (line != "--help")
    assert ("#SBATCH" in out) == (bool(dry) and line != "--help")


@pytest.mark.slow
def test_what_is_slow_is_announced(user: Path) -> None:
    out, err = python("", "submit", "run.yaml", "--time", "60", "--dry_run").communicate(timeout=600)
    assert "#SBATCH" in out, err
    assert err == "graftvit: checking the run: its settings, teacher, data and plan ...\n"


def test_what_the_plan_warns_of_is_said(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = "length  9 steps\n        warning: it ends in its warm-up\n"
    monkeypatch.setattr("graftvit.launch.plan_text.describe_plan", lambda *_, **__: plans)
    check_runs(plan_run("run.yaml", [], []), ClusterConfig())
    assert capsys.readouterr().err.splitlines()[1:] == ["graftvit: warning: it ends in its warm-up"]


def test_data_that_the_run_downloads_are_not_looked_for(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.launch.plan_text.describe_plan", lambda *_, **__: "")
    looked: list[bool] = []
    monkeypatch.setattr(
        "graftvit.transfer.data.datasets.check_dataset", lambda data: looked.append(data.download)
    )
    for download in ("true", "false"):
        words = ["data.dataset=torch/cifar10", "data.data_path=none", f"data.download={download}"]
        check_runs(plan_run("run.yaml", list(map(parse_override, words)), []), ClusterConfig())
    assert looked == [False]


BEFORE = """
from graftvit.launch.slurm import submission
submission.check_commands = lambda: (sys.stderr.write('here\\n'), sys.stderr.flush(), __import__('time').sleep(60))
"""
BETWEEN = """
from graftvit.launch.slurm import submission
order = submission.submit
def submit(launch):
    order(launch)
    sys.stderr.write('here\\n'), sys.stderr.flush(), __import__('time').sleep(60)
submission.submit = submit
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize("called", [False, True])
def test_who_stops_a_submission_in_time_is_told_that_nothing_was_submitted(
    called: bool, number: signal.Signals, name: str, user: Path
) -> None:
    """Once sbatch was called, nothing is said of it."""
    process = python(BETWEEN if called else BEFORE, "submit", "run.yaml", "--unchecked")
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    assert (user / "bin" / "sbatch.called").exists() == called
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert (user / "bin" / "sbatch.called").exists() == called
    if called:
        assert "nothing" not in err
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    else:
        assert err == f"graftvit: error: stopped by {name}: nothing was submitted\n"
        assert process.returncode == 128 + number


def finished(folder: Path) -> RunConfig:
    """A run of one epoch that was submitted as job 12 and is through."""
    run = config(folder, optim={"epochs": 1})
    train(run)
    submitted(folder)
    return run


def again(run: RunConfig, *words: str, **resources: Any) -> str:
    """What a submission into the folder of a run says before it is sent."""
    recipe = run.output_dir.with_name("again.yaml")
    recipe.write_text(dump_config(run))
    plan = plan_run(str(recipe), [parse_override(word) for word in words], [])
    return describe_again(plan, ClusterConfig(**resources))


def test_what_is_resumed_and_what_differs_is_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert again(run, "optim.epochs=3", nodes=2) == (
        "resumes at epoch 2 of 3; changed: optim.epochs 1 -> 3, nodes 1 -> 2"
    )
    assert again(run, "optim.max_steps=40", "data.workers=1", partition="gpu", sbatch={"nice": 5}) == (
        "resumes at epoch 2 of a run of 40 steps; changed: data.workers 0 -> 1, optim.max_steps none -> 40, "
        "partition none -> gpu, sbatch.nice none -> 5"
    )
    assert again(run) == "has finished: nothing is left to train; nothing changed"
    longer = run.model_copy(update={"optim": run.optim.model_copy(update={"epochs": 3})})
    assert "changed: optim.epochs 1 -> 3\n" in describe_plan(longer)
    plan = plan_run(str(tmp_path / "run"), [], [])
    refuse_finished(plan)  # no attempt says that it finished: its student may be missing
    attempted(tmp_path / "run", "finished")
    with pytest.raises(ConfigError, match="has finished: there is nothing left to train; give more --epochs"):
        refuse_finished(plan)
    refuse_finished(plan_run(str(tmp_path / "run"), [parse_override("optim.epochs=3")], []))


def test_a_new_run_and_one_that_saved_nothing(tmp_path: Path) -> None:
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"))
    assert again(run) == ""
    pinned = run.model_copy(update={"teacher": run.teacher.model_copy(update={"revision": "abc"})})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(pinned))  # the commit of a teacher is no change
    assert again(run, "seed=3") == "starts again, because nothing was saved; changed: seed 0 -> 3"


def test_cells_that_go_on_are_counted(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", "seed=0..1")
    (sweep.cells[1].folder / "checkpoints").mkdir(parents=True)
    (sweep.cells[1].folder / "checkpoints" / "last.safetensors").touch()
    plan = plan_run("digits_scratch", [parse_override(f"output_dir={tmp_path / 'sweep'}")], ["seed=0..1"])
    assert describe_again(plan, ClusterConfig()) == "1 of 2 cells resumes from what it has saved"


def test_it_is_said_before_the_job_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from graftvit.launch.cli import main

    run = finished(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    heard: list[str] = []

    def send(launch: object) -> list[str]:
        heard.append(capsys.readouterr().err)
        return ["77"]

    monkeypatch.setattr(submission, "submit", send)
    monkeypatch.setattr(submission, "_refuse_second", lambda *_: None)
    line = f"submit {tmp_path}/run.yaml --optim.epochs 2 --cluster local --gpus_per_node 0 --unchecked"
    assert main(line.split()) == 0
    assert (
        "graftvit: resumes at epoch 2 of 2; changed: optim.epochs 1 -> 2, cluster slurm -> local" in heard[0]
    )
    assert capsys.readouterr().out.startswith("submitted job 77 in")


def test_of_stages_each_changed_setting_is_named_with_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path / "run").model_dump(mode="json")
    recipe = {**run, "stages": [{"name": "one"}, {"name": "two", "optim": {"epochs": 2}}]}
    Path("run.yaml").write_text(yaml.safe_dump(recipe))
    plan_run("run.yaml", [], []).write()
    submitted(tmp_path / "run")
    (tmp_path / "run" / "1-two").mkdir()
    (tmp_path / "run" / "1-two" / "config.yaml").write_text("")

    def said(*words: str) -> str:
        plan = plan_run("run.yaml", [parse_override(word) for word in words], [])
        return describe_again(plan, ClusterConfig(nodes=2)).partition("; ")[2]

    assert said() == "changed: nodes 1 -> 2"
    recipe["stages"][1]["optim"]["epochs"] = 4
    Path("run.yaml").write_text(yaml.safe_dump(recipe))
    longer = "two.optim.epochs 2 -> 4"
    assert said() == f"changed: {longer}, nodes 1 -> 2"
    assert said("seed=7") == f"changed: one.seed 0 -> 7, {longer}, two.seed 0 -> 7, nodes 1 -> 2"
    (tmp_path / "run" / "jobs" / "config.yaml").write_text("[")
    assert said() == "changed: nodes 1 -> 2"


def test_jobs_of_runs_and_of_all_cells_of_a_sweep_are_waited_for(tmp_path: Path, slurm: FakeSlurm) -> None:
    submitted(tmp_path / "run", job_id="7")
    for place, cell in enumerate(make_sweep(tmp_path / "sweep", "seed=0..2").cells):
        submitted(cell.folder, job_id=f"9_{place}")
        if place == 1:
            attempted(cell.folder, "finished")
    slurm.says(dict.fromkeys(("7", "9_0", "9_2"), "RUNNING"))
    found = dependency_on([tmp_path / "run", tmp_path / "sweep"], "afterany:3")
    assert found == {"dependency": "afterany:3,afterok:7:9_0:9_2", "sbatch": {"kill_on_invalid_dep": "yes"}}


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "REQUEUED", "SUSPENDED"])
def test_what_may_still_finish_is_waited_for(state: str, tmp_path: Path, slurm: FakeSlurm) -> None:
    submitted(tmp_path)
    attempted(tmp_path, "requeued")
    slurm.says(state)
    assert dependency_on([tmp_path])["dependency"] == "afterok:12"


@pytest.mark.parametrize("outcome", ["failed", "stopped", "requeued", None, "finished"])
def test_what_can_no_longer_finish_is_refused(outcome: str | None, tmp_path: Path, slurm: FakeSlurm) -> None:
    run = tmp_path / "a run"
    submitted(run)
    attempted(run, outcome)
    slurm.says("FAILED")
    if outcome == "finished":
        assert dependency_on([run]) == {}  # nothing is left to wait for
        return
    why = f"--after {run}: {run} has neither finished nor a job that could: .*graftvit jobs resume '{run}'"
    with pytest.raises(ConfigError, match=why):
        dependency_on([run])


def test_a_job_of_this_machine_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = submitted(tmp_path, cluster="local", job_id="4321").submission()
    judged = SimpleNamespace(active=True, words="running", submission=made)
    monkeypatch.setattr(submission, "judge_jobs", lambda *_, **__: {tmp_path: [judged]})
    with pytest.raises(ConfigError, match="which Slurm cannot wait for"):
        dependency_on([tmp_path])


def test_what_was_never_submitted_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was never submitted"):
        dependency_on([tmp_path])
    with pytest.raises(ConfigError, match="is no folder"):
        dependency_on([tmp_path / "none"])


def test_the_flag_after(tmp_path: Path, slurm: FakeSlurm) -> None:
    for name, job in (("a", "7"), ("b", "8")):
        submitted(tmp_path / name, job_id=job)
    slurm.says("RUNNING")
    parser = command_parser("submit", "", [])
    add_cluster_flags(parser)
    words = ["--after", str(tmp_path / "a"), "--dependency=singleton", f"--after={tmp_path / 'b'}"]
    asked = asked_by(parse_command(parser, words)[0])
    assert asked.config().options()["dependency"] == "singleton,afterok:7:8"
    assert "  dependency          singleton,afterok:7:8  --after\n" in describe(asked)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    launch = Launch("x", tmp_path, [Request(["train"], tmp_path)], ClusterConfig(), 1)
    launch.place.mkdir(parents=True)
    return launch


def answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, lines: str = "", queued: str = ""
) -> None:
    """An sbatch that says so, and a queue that has the job under a number, or does not know it (yet)."""
    write_program(folder / "bin", "sbatch", f"cat <<'END'\n{said}\nEND\n{lines}\n")
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    monkeypatch.setattr(submit, "number_by_name", lambda place: queued)


@pytest.mark.parametrize(
    ("said", "queued"),
    [
        ("123", ""),
        ("123;cluster", ""),
        ("Welcome to the cluster!\n5 jobs are waiting\n123", ""),
        ("123\n\nthis job will cost 5 units", ""),
        ("123;cluster\nbudget left: 77 %", ""),
        ("Submitted batch job 123", ""),
        ("Submitted batch job 123 on cluster x", ""),
        ("sbatch: lua: default partition set\nSubmitted batch job 123 on cluster x\ngood luck", ""),
        ("123\n500", "123"),  # where it could be another number, the queue is asked
    ],
)
def test_the_number_of_the_job_is_found(
    said: str, queued: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a site has put a program of its own in front of sbatch."""
    answer(tmp_path, monkeypatch, said, queued=queued)
    assert submit._sbatch(launch) == "123"


@pytest.mark.parametrize("lines", ["", "echo a warning of the site >&2", "echo no such account >&2; exit 1"])
def test_a_job_that_was_taken_is_not_called_refused(
    lines: str, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = "exit" in lines
    answer(tmp_path, monkeypatch, "" if fails else "it is done", lines)
    said = "refused the job: no such account" if fails else "may be queued all the same"
    with pytest.raises(GraftError, match=said) as raised:
        submit._sbatch(launch)
    assert isinstance(raised.value, ConfigError) == fails


HOLD = """
import sys
from pathlib import Path
from graftvit.launch.slurm.lock import submitting
with submitting(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another command, which submits until its input ends."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refuse_submitting(folder: Path, why: str) -> None:
    with pytest.raises(ConfigError, match=why), submitting(folder, wait=0.1):
        pass


def test_a_second_submission_waits_and_then_gives_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert not is_submitting(folder)
    other = holder(folder)
    assert is_submitting(folder)
    refuse_submitting(folder, f"{folder} is being submitted by another command")
    assert "waiting for another command that submits to" in caplog.text
    other.communicate("")
    with submitting(folder, wait=0.0):
        assert not is_submitting(folder)  # no other command does
    assert not is_submitting(folder)
    other = holder(folder)
    other.kill()  # what is killed holds nothing
    other.communicate()
    with submitting(folder, wait=0.0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with submitting(tmp_path):
        lock._mine.clear()  # as another process sees it
        assert is_submitting(tmp_path)
        refuse_submitting(tmp_path, "is being submitted by another command")
    assert not is_submitting(tmp_path)


def test_a_folder_that_cannot_be_written_takes_no_submission(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse_submitting(tmp_path / "file" / "run", "run cannot be written: Not a directory")
