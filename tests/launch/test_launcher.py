"""Which launcher started a process, and what it tells torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from graftvit.launch import launcher as module
from graftvit.launch.cli import main
from graftvit.launch.launcher import (
    PORTS,
    launcher,
    limit_threads,
    prepare_process,
    refuse_several,
    srun_ranks,
)
from graftvit.models.errors import ConfigError
from support.hub.ports import free_ports
from support.runs.launched import TRAIN, clean, recipe, run_all
from support.runs.typed import Typed

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


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
    assert launcher(environment) == "variables"  # so a second command in this process takes the same ranks
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
