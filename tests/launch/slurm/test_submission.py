"""What a careless user meets before anything is queued: each mistake at once, by the name it was made under."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.slurm import checks
from graftvit.launch.slurm import checks as inventory
from graftvit.launch.slurm.requests import plan_run
from graftvit.launch.slurm.setting_layers import ask
from graftvit.launch.slurm.settings import ClusterConfig
from graftvit.launch.slurm.submission import check_runs
from graftvit.models.errors import ConfigError
from support.slurm.cluster_users import user_with_recipe, write_site

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


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two nodes, whose state the test may change."""
    told = {"state": "idle"}

    def output(*command: str) -> str:
        if command[0] == "sinfo":
            return NODES.format(**told)
        return PARTITION if "partition" in command else "No reservations in the system\n"

    monkeypatch.setattr(inventory, "output", output)
    monkeypatch.setenv("XDG_CONFIG_DIRS", "/nowhere")
    for name in [name for name in os.environ if name.startswith("SBATCH_")]:
        monkeypatch.delenv(name)
    return told


@pytest.fixture
def user(tmp_path: Path, nodes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a recipe `run.yaml` on a login node, whose Slurm is made of shell scripts."""
    for name, lines in SLURM.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{lines}")
        program.chmod(0o755)
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
    return subprocess.Popen(
        [sys.executable, "-c", text], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


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


ORIGINS = [
    (
        {"SBATCH_PARTITION": "hihg"},
        {},
        "SBATCH_PARTITION is hihg: no partition of this cluster is called 'hihg'",
    ),
    ({}, {"partition": "hihg"}, "{site}: partition is hihg: no partition"),
    (
        {},
        {"profile": "big", "profiles": {"big": {"nodes": 9}}},
        "{site}: profiles.big.nodes is 9: partition main has 2",
    ),
    ({"SBATCH_TIMELIMIT": "1-0"}, {}, "SBATCH_TIMELIMIT is 1-0: partition main allows 12:00:00"),
    ({"SBATCH_TIMELIMIT": "1"}, {}, "SBATCH_TIMELIMIT is 1: "),
    (
        {"SBATCH_GPUS_PER_NODE": "8"},
        {},
        "SBATCH_GPUS_PER_NODE is 8: partition main has nodes with up to 4 GPUs",
    ),
    ({"SBATCH_MEM_PER_NODE": "9G"}, {}, "SBATCH_MEM_PER_NODE is 9216: partition main"),
    ({"SBATCH_MEM_PER_CPU": "9G"}, {}, "SBATCH_MEM_PER_CPU x cores a node is 9216: partition main"),
    ({"SBATCH_GRES": "gpu:9"}, {}, "SBATCH_GRES is gpu:9: partition main"),
    ({}, {"cpus_per_task": 99}, "{site}: cpus_per_task x tasks a node is 99: partition main"),
]


@pytest.mark.parametrize(("surroundings", "content", "sentence"), ORIGINS)
def test_a_check_names_where_a_value_is_from(
    surroundings: dict[str, str], content: dict[str, object], sentence: str, user: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write_site(**{"time": "1:00:00", **content})
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    asked = ask({}).config()
    assert sentence.format(site=path) in refused(asked, asked.cpus_per_task or 1)


def test_a_value_that_nobody_gave_is_called_the_default(nodes: dict[str, str]) -> None:
    assert refused(ClusterConfig(gpus_per_node=0)).startswith(
        "--time is 24:00:00 by default: partition main allows"
    )


GENERIC = [
    ("tmpdisk:500", "--gres is tmpdisk:500: partition main has nodes with up to 2148 tmpdisk, and"),
    ("tmpdisk:3K", "--gres is tmpdisk:3K: partition main has nodes with up to 2148 tmpdisk, and"),
    ("gpu:1,tmpdisk:hdd:1", "partition main has nodes with up to 0 tmpdisk:hdd, and 0 of its 2 nodes"),
]


@pytest.mark.parametrize("state", ["idle", "drained"])
@pytest.mark.parametrize(("gres", "sentence"), GENERIC)
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
@pytest.mark.parametrize("words", [["--partition", "hihg"], ["--time", "1"], ["--output_dir", "/tmp/nobody"]])
@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_what_needs_no_torch_is_told_before_it_is_loaded(
    user: Path, words: list[str], dry: list[str]
) -> None:
    program = "import atexit\natexit.register(lambda: print('torch loaded:', 'torch' in sys.modules))"
    out, err = python(program, "submit", "run.yaml", *words, *dry).communicate(timeout=60)
    assert "torch loaded: False" in out, err
    assert err.startswith("graftvit: error: ")
    assert ("#SBATCH" in out) == bool(dry)


@pytest.mark.slow
def test_what_is_slow_is_announced(user: Path) -> None:
    out, err = python("", "submit", "run.yaml", "--time", "60", "--dry_run").communicate(timeout=120)
    assert "#SBATCH" in out, err
    assert err == "graftvit: checking the run: its settings, teacher, data and plan ...\n"


def test_what_the_plan_warns_of_is_said(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = "length  9 steps\n        warning: it ends in its warm-up\n"
    monkeypatch.setattr("graftvit.launch.plan_text.describe_plan", lambda *_, **__: plans)
    check_runs(plan_run("run.yaml", [], []), ClusterConfig())
    assert capsys.readouterr().err.splitlines()[1:] == ["graftvit: warning: it ends in its warm-up"]


@pytest.mark.slow
def test_help_loads_nothing_slow(user: Path) -> None:
    program = "import atexit\natexit.register(lambda: print('torch loaded:', 'torch' in sys.modules))"
    assert "torch loaded: False" in python(program, "submit", "--help").communicate(timeout=60)[0]


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
def test_who_stops_a_submission_in_time_is_told_that_nothing_was_submitted(
    number: signal.Signals, name: str, user: Path
) -> None:
    process = python(BEFORE, "submit", "run.yaml", "--unchecked")
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert err == f"graftvit: error: stopped by {name}: nothing was submitted\n"
    assert process.returncode == 128 + number
    assert not (user / "bin" / "sbatch.called").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_sbatch_was_called_nothing_is_said_of_it(number: signal.Signals, user: Path) -> None:
    process = python(BETWEEN, "submit", "run.yaml", "--unchecked")
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    assert (user / "bin" / "sbatch.called").exists()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "nothing" not in err
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
