"""Which launcher started a process, what it tells torch, and what submitit does that a run must not depend on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import submitit
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from graftvit.checkpoints.state import read_state
from graftvit.launch.cli import main
from graftvit.launch.slurm import environment as module
from graftvit.launch.slurm.environment import (
    INSIDE_A_LAUNCHER,
    PORTS,
    export_ranks,
    forget_old_results,
    launcher,
    limit_threads,
    outside_of_a_job,
    prepare_process,
    refuse_several,
    requeue,
    srun_ranks,
    start_script,
)
from graftvit.models.errors import ConfigError, RunFailedError
from support.hub.ports import free_ports
from support.runs.engine_runs import config, records
from support.runs.typed import Typed
from support.slurm.cluster_users import write_program
from support.slurm.slurm_cluster import SlurmCluster

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
INSIDE = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "OMPI", "PMI")


def task(rank: int = 1, tasks: int = 2, **more: str) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_JOB_ID": "7", **more}


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "python"),  # the batch script itself
        ({"SLURM_STEP_NUM_TASKS": "8"}, "python"),  # left over in a shell, no task
        (task(0, 1), "python"),
        (task(), "srun"),
        (task(PMI_SIZE="2", PMI_RANK="1"), "srun"),  # srun --mpi=pmi2
        ({**TORCHRUN, **task(0, 1)}, "torchrun"),
        ({**TORCHRUN, **task(1, 2), "GROUP_WORLD_SIZE": "2"}, "torchrun"),
        ({**BY_HAND, **task(1, 2)}, "variables"),
        ({**BY_HAND, "WORLD_SIZE": "4", **task(0, 2)}, "variables"),  # each task starts two
        ({**BY_HAND, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", **task(0, 1)}, "variables"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "python"),  # exported by a batch script for its srun
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "python"),  # accelerate launch of one process
    ],
)
def test_a_launcher_is_recognized(environment: dict[str, str], kind: str) -> None:
    assert launcher(environment) == kind


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**TORCHRUN, **task(0, 2)}, "srun started torchrun 2 times, but each of them knows of 1"),
        ({**TORCHRUN, **task(0, 4), "GROUP_WORLD_SIZE": "2"}, "srun started torchrun 4 times"),
        ({"OMPI_COMM_WORLD_SIZE": "8", **task(0, 2)}, "mpirun started 8 processes"),  # by srun's daemons
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "mpirun started 3 processes"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3", **task(1, 2)}, "mpirun started 4 processes"),
        ({"RANK": "0", "WORLD_SIZE": "1", **task(1, 2)}, "srun started 2 processes"),
        ({**BY_HAND, "RANK": "0", **task(1, 2)}, "this one, 1, has RANK=0 and WORLD_SIZE=2"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "RANK=1 WORLD_SIZE=2 LOCAL_RANK= MASTER_ADDR= MASTER_PORT=: set all",
        ),
        ({"LOCAL_RANK": "1"}, "RANK= WORLD_SIZE= LOCAL_RANK=1"),
        ({**BY_HAND, "RANK": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({**BY_HAND, "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
    ],
)
def test_what_would_be_several_runs_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        launcher(environment)
    assert words in str(raised.value)


def test_an_interactive_shell_of_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = task(0, 8, SLURM_PTY_PORT="31000")
    monkeypatch.setattr(os, "isatty", lambda number: number == 0)
    assert launcher(shell) == "python"
    assert launcher({**shell, **TORCHRUN}) == "torchrun"
    monkeypatch.setattr(os, "isatty", lambda number: False)  # an srun that was typed in it
    assert launcher(shell) == "srun"


def accelerate_variables(*words: str) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of a machine."""
    arguments = launch_command_parser().parse_args([*words, "train.py"])
    own = {"mixed_precision": "no", "dynamo_backend": "no", "use_cpu": arguments.cpu}
    vars(arguments).update(**own, num_cpu_threads_per_process=1)
    simple = arguments.cpu
    made = prepare_simple_launcher_cmd_env(arguments)[1] if simple else prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


MACHINES = ("--num_processes", "2", "--num_machines", "2", "--machine_rank", "1",
            "--main_process_ip", "10.0.0.1", "--main_process_port", "29501")  # fmt: skip


def test_accelerate_is_torchrun_with_gpus_and_would_be_several_runs_on_cpus() -> None:
    variables = accelerate_variables("--multi_gpu", *MACHINES)
    assert not {"RANK", "WORLD_SIZE"} & set(variables)  # torch.distributed.run, which it calls, sets them
    assert launcher({**variables, **TORCHRUN}) == "torchrun"
    for words in (MACHINES, ("--num_processes", "2", "--num_machines", "1")):
        variables = accelerate_variables("--cpu", *words)
        assert variables["MASTER_PORT"]
        with pytest.raises(ConfigError, match="accelerate launch --cpu gives its processes no ranks"):
            launcher(variables)


def test_srun_tells_what_torch_asks_for() -> None:
    place = {"SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3"}
    environment = task(5, 7, **place, SLURM_STEP_NODELIST="n1,n2")
    prepare_process(environment)
    wanted = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "n1"}
    assert wanted.items() <= environment.items()
    assert int(environment["MASTER_PORT"]) in PORTS
    assert launcher(environment) == "variables"  # and a second command in this process goes on with them
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "HOME": "/"}
    prepare_process(alone)
    assert alone == {"HOME": "/"}, "one process by hand needs no group"


def test_each_step_and_restart_has_a_port_of_its_own() -> None:
    whole = task(SLURM_STEP_ID="0", SLURM_STEP_NODELIST="n1")
    others = [{**whole, "SLURM_STEP_ID": "1"}, {**whole, "SLURM_RESTART_COUNT": "1"}]
    ports = {srun_ranks(one)["MASTER_PORT"] for one in (whole, *others)}
    assert len(ports) == 3
    assert all(int(port) in PORTS for port in ports)
    given = {**whole, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert (srun_ranks(given)["MASTER_ADDR"], srun_ranks(given)["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    ("counts", "each"), [("4", ["4"]), ("4(x2),3", ["4", "4", "3"]), ("16(x12)", ["16"] * 12)]
)
def test_tasks_of_each_node(counts: str, each: list[str]) -> None:
    places = [task(SLURM_STEP_TASKS_PER_NODE=counts, SLURM_NODEID=str(node)) for node in range(len(each))]
    assert [srun_ranks(place)["LOCAL_WORLD_SIZE"] for place in places] == each


def test_the_first_host() -> None:
    def first(**nodes: str) -> str:
        return srun_ranks(task(**nodes))["MASTER_ADDR"]

    assert first(SLURM_STEP_NODELIST="n[7-8,12],m1", SLURM_JOB_NODELIST="n1") == "n7"
    assert first(SLURM_JOB_NODELIST="gpu3") == "gpu3"
    assert first() == "localhost"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "8"}, "3"),
        ({"SLURM_CPUS_PER_TASK": "8"}, "8"),
        ({"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "4"}, "8"),
        ({"LOCAL_WORLD_SIZE": "4"}, "3"),
        ({"LOCAL_WORLD_SIZE": "64"}, "1"),
        ({}, None),
    ],
)
def test_threads_come_from_the_allocation(
    environment: dict[str, str], threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    limit_threads(environment)
    assert environment.get("OMP_NUM_THREADS") == threads


def test_only_commands_that_train_together_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(module, "limit_threads", pytest.fail)
    assert main(["list", "recipes"]) == 0
    assert main(["train", "--print_config"]) == 2  # RANK alone


def test_a_command_of_one_process(monkeypatch: pytest.MonkeyPatch, typed: Typed) -> None:
    for one in ({}, task(0, 1), {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "8"}):
        refuse_several("compare", one)
    for one in (task(), TORCHRUN, BY_HAND):
        with pytest.raises(ConfigError, match="`graftvit demo` is one process, and 2 were started"):
            refuse_several("demo", one)
    for name, value in task().items():
        monkeypatch.setenv(name, value)
    assert "`graftvit compare` is one process" in typed("compare", code=2).err


def clean(**more: str) -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if not name.startswith(INSIDE)}
    return {**left, "OMP_NUM_THREADS": "1", **more}


def recipe(tmp_path: Path) -> Path:
    """Four steps of two ranks, in `tmp_path/run`."""
    sizes, length = {"train_samples": 64, "batch_size": 16}, {"epochs": 2, "warmup_epochs": 0}
    run = config(tmp_path / "run", data=sizes, optim=length, engine={"log_interval": 1})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return path


def run_all(commands: list[list[str]], environments: list[Mapping[str, str]], cwd: Path) -> None:
    """Run the commands side by side; they share one run, and nobody else writes into its log."""
    started = [
        subprocess.Popen(command, env=dict(environment), cwd=cwd, stderr=subprocess.PIPE, text=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        said = [one.communicate(timeout=600)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * len(started), said
    assert read_state(cwd / "run" / "checkpoints" / "last.safetensors").meta["world_size"] == 2
    steps = [record["step"] for record in records(cwd / "run") if "train_loss" in record]
    assert steps == [1, 2, 2, 3, 4, 4]  # two steps an epoch, and the epoch's own record


TRAIN = ("-m", "graftvit.launch", "train")


@pytest.mark.slow
def test_torchrun_on_two_machines(tmp_path: Path) -> None:
    path, port = recipe(tmp_path), free_ports(1)[0]
    agents = [
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
         str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port), *TRAIN, str(path)]
        for rank in range(2)
    ]  # fmt: skip
    run_all(agents, [clean()] * 2, tmp_path)


@pytest.mark.slow
def test_variables_set_by_hand(tmp_path: Path) -> None:
    path, port = recipe(tmp_path), free_ports(1)[0]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [clean(RANK=str(rank), **common) for rank in range(2)]
    run_all([[sys.executable, *TRAIN, str(path)]] * 2, environments, tmp_path)


@pytest.mark.slurm
@pytest.mark.slow
def test_plain_srun(tmp_path: Path, cluster: SlurmCluster) -> None:
    path = recipe(tmp_path)
    command = ["srun", "-N", "2", "-n", "2", sys.executable, *TRAIN, str(path)]
    run_all([command], [clean(**cluster.environment)], tmp_path)


@pytest.fixture
def in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in rank 1 of 4 of job 77, with a folder in front of PATH."""
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "node[1-2]", "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in (*INSIDE_A_LAUNCHER, "SLURM_ARRAY_JOB_ID"):
        monkeypatch.setenv(name, "")  # so that what a test exports is taken back, too
        monkeypatch.delenv(name)
    return tmp_path


def start(
    folder: Path, *words: str, code: Path | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the script that starts a task, with the folder in front of PATH and its code, unless another is given."""
    script = folder / "start.sh"
    script.write_text(start_script(shlex.quote(str(code or folder)), folder))
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    more = {"env": {**os.environ, **path}, **more}
    return subprocess.run(["sh", str(script), *words], capture_output=True, text=True, **more)


BLOCKED = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), flush=True)"


def test_a_signal_before_the_handlers_waits_for_them(tmp_path: Path) -> None:
    code = (
        f"{BLOCKED}; import os, time; os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.2)\n"
        "from graftvit.transfer.engine import early_signals as early\n"
        "early.remember_signals(); time.sleep(0.05); print(early.received)"
    )
    done = start(tmp_path, "-c", code)
    blocked, received = done.stdout.splitlines()
    assert "SIGUSR2" in blocked
    assert "SIGTERM" in blocked
    assert received == f"[{signal.SIGUSR2.value}]"
    assert "torch" not in done.stderr


def test_a_preemption_in_the_first_moment_does_not_end_the_task(tmp_path: Path) -> None:
    """Where the script only tries whether it can block."""
    signals = '[ "$2" = true ] && kill -TERM $PPID && kill -USR2 $PPID'
    write_program(tmp_path, "env", f'{signals}\nexec {shutil.which("env")} "$@"')
    done = start(tmp_path, "-c", "print('started')", start_new_session=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "started\n")


@pytest.mark.parametrize("before", [{}, {"PYTHONPATH": "/mine"}])
def test_the_script_puts_the_copied_code_first_and_keeps_the_rest_of_the_path(
    before: dict[str, str], tmp_path: Path
) -> None:
    code = tmp_path / "a folder's code"
    code.mkdir()
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    show = "import os; print(os.environ['PYTHONPATH'])"
    found = start(tmp_path, "-c", show, code=code, env={**own, **before}).stdout.strip()
    assert found == ":".join([str(code), *before.values()])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python 3.10 looks in the folder it is started in")
def test_the_script_does_not_look_where_it_was_submitted(tmp_path: Path) -> None:
    for folder in ("code", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thing.py").write_text(f"print('{folder}')")
    assert start(tmp_path, "-m", "thing", code=tmp_path / "code", cwd=tmp_path / "here").stdout == "code\n"


def test_the_script_starts_where_env_cannot_block_but_not_without_the_copy(tmp_path: Path) -> None:
    write_program(tmp_path, "env", "exit 125")
    done = start(tmp_path, "-c", BLOCKED)
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
    done = start(tmp_path, "-c", "print('started')", code=tmp_path / "code")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"the copy of the code is gone, submit again: {tmp_path}/code\n"


def test_results_of_earlier_attempts_are_forgotten_but_only_ones_own(in_slurm: Path) -> None:
    mine = submitit.JobEnvironment().paths.result_pickle
    assert mine.name == "77_1_result.pkl"
    other = in_slurm / "77_0_result.pkl"
    torn = in_slurm / "77_1_result.pkl.save_tmp"
    for path in (mine, other, torn):
        path.write_bytes(b"old")
    forget_old_results()
    assert (mine.exists(), torn.exists(), other.exists()) == (False, False, True)
    forget_old_results()  # nothing there


def test_scontrol_survives_the_signal_that_its_own_requeue_sends(in_slurm: Path) -> None:
    """A slow scontrol, in a step of which every process gets SIGTERM while it runs."""
    write_program(in_slurm, "scontrol", f"echo $$ > {in_slurm}/pid; sleep 0.4; echo $@ > {in_slurm}/asked")
    before = signal.getsignal(signal.SIGTERM)

    def end_all() -> None:
        while not (in_slurm / "pid").exists() or not (in_slurm / "pid").read_text().strip():
            time.sleep(0.01)
        os.kill(int((in_slurm / "pid").read_text()), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end_all)
    thread.start()
    requeue()
    thread.join()
    assert (in_slurm / "asked").read_text() == "requeue incomplete 77\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_requeue_is_asked_for_again_where_the_controller_is_away(
    in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEUE_PAUSE", 0.01)
    write_program(in_slurm, "scontrol", f"echo x >> {in_slurm}/asked; [ $(wc -l < {in_slurm}/asked) -ge 3 ]")
    requeue()
    assert (in_slurm / "asked").read_text() == "x\n" * 3
    write_program(in_slurm, "scontrol", "exit 1")
    with pytest.raises(RunFailedError, match=r"cannot be requeued .* `graftvit jobs resume` resumes"):
        requeue()


def test_a_job_that_submits_hands_nothing_of_itself_on(
    in_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/ours.conf")
    monkeypatch.setenv("RANK", "3")
    before = dict(os.environ)
    with outside_of_a_job():
        inside = dict(os.environ)
    assert dict(os.environ) == before
    assert inside["SLURM_CONF"] == "/etc/ours.conf"
    assert [name for name in inside if name.startswith(("SLURM_", "SUBMITIT_"))] == ["SLURM_CONF"]
    assert "RANK" not in inside


def test_each_attempt_meets_at_a_port_of_its_own(in_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {export_ranks(restart)["MASTER_PORT"] for restart in range(50)}
    assert len(ports) == 50
    assert all(int(port) in PORTS for port in ports)
    wanted = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"}
    assert wanted.items() <= os.environ.items()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "1"
    monkeypatch.setenv("SLURM_NTASKS", "1")  # one process alone is no group
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert export_ranks(0) == {}
    assert "WORLD_SIZE" not in os.environ
