"""Which of flags, profile, surroundings, site file and defaults wins, and what the dry run says of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.slurm.setting_layers import describe
from graftvit.launch.slurm.settings import ClusterConfig
from support.slurm.cluster_users import asked, refusal, write_site


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", f"{tmp_path}/none:{tmp_path}/all")
    for name in [name for name in os.environ if name.startswith("SBATCH_")]:
        monkeypatch.delenv(name)


def site_of_all(tmp_path: Path, **values: Any) -> Path:
    """What an administrator wrote."""
    path = tmp_path / "all" / "graftvit" / "cluster.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def config(*words: str, before: dict[str, Any] | None = None) -> ClusterConfig:
    return asked(*words, before=before).config()


def test_a_flag_wins_over_the_surroundings_and_those_over_the_site_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_site(partition="of_the_site", account="of_the_site", qos="of_the_site")
    for name in ("PARTITION", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "of_the_surroundings")
    found = config("--partition", "of_the_flag")
    assert (found.partition, found.account, found.qos) == (
        "of_the_flag",
        "of_the_surroundings",
        "of_the_site",
    )


SURROUNDINGS = {
    "SBATCH_ACCOUNT": ("account", "lab"),
    "SBATCH_CONSTRAINT": ("constraint", "a100|h100"),
    "SBATCH_GPUS_PER_NODE": ("gpus_per_node", "a100:4"),
    "SBATCH_GPU_BIND": ("gpu_bind", "closest"),
    "SBATCH_GRES": ("gres", "tmpdisk:100"),
    "SBATCH_MEM_PER_CPU": ("mem_per_cpu", "4G"),
    "SBATCH_MEM_PER_GPU": ("mem_per_gpu", "60G"),
    "SBATCH_MEM_PER_NODE": ("mem", "240G"),
    "SBATCH_PARTITION": ("partition", "main,high"),
    "SBATCH_QOS": ("qos", "long"),
    "SBATCH_RESERVATION": ("reservation", "weekend"),
    "SBATCH_TIMELIMIT": ("time", "1-00:00:00"),
}


@pytest.mark.parametrize(("variable", "name", "value"), [(one, *two) for one, two in SURROUNDINGS.items()])
def test_what_sbatch_takes_from_the_surroundings(
    variable: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "")
    assert config() == ClusterConfig()
    monkeypatch.setenv(variable, value)
    assert config() == ClusterConfig(**{name: value})
    assert f"  {name:<18} {value:<22} {variable}\n" in describe(asked())


@pytest.mark.parametrize(
    ("value", "option"),
    [("", True), ("yes", True), ("1", True), ("user", "user"), ("0", None), ("no", None)],
)
def test_options_of_the_surroundings_without_a_value(
    value: str, option: bool | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_EXCLUSIVE", value)
    assert config().sbatch == ({} if option is None else {"exclusive": option})
    assert config("--sbatch", "exclusive=false").sbatch == {}


def test_other_options_of_the_surroundings_are_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(sbatch={"wckey": "of_the_site", "nice": 5})
    monkeypatch.setenv("SBATCH_WCKEY", "of_the_surroundings")
    assert config().sbatch == {"wckey": "of_the_surroundings", "nice": 5}
    assert "  wckey              of_the_surroundings    SBATCH_WCKEY\n" in describe(asked())


@pytest.mark.parametrize(
    "name", ["SIGNAL", "REQUEUE", "NO_REQUEUE", "OPEN_MODE", "ARRAY_INX", "OUTPUT", "NO_KILL"]
)
def test_what_would_break_a_run_is_left_out_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"SBATCH_{name}", "1")
    assert config() == ClusterConfig()
    assert f"left out, as it would break what a run needs: SBATCH_{name}\n" in describe(asked())


def test_a_wrong_value_of_the_surroundings_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "soon")
    assert refusal().startswith("SBATCH_TIMELIMIT is 'soon': ")
    assert config("--time", "60").minutes == 60


def test_each_value_is_shown_with_its_origin() -> None:
    path = write_site(partition="gpu", shared_folders=["/scratch"], setup=["module load cuda", "umask 002"])
    assert describe(asked("--nodes", "2", "--sbatch", "mail-type=END")) == (
        "asked of the cluster:\n"
        f"  partition          gpu                    {path}: partition\n"
        f"  setup              module load cuda; umask 002 {path}: setup\n"
        "  nodes              2                      --nodes\n"
        "  mail-type          END                    --sbatch\n"
    )


PROFILES = {
    "debug": {"partition": "debug", "time": "0:30:00"},
    "big": {"nodes": 8, "sbatch": {"exclusive": True}, "mem": "100G"},
}


def test_a_profile_goes_before_the_surroundings_and_the_file_and_after_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_site(partition="gpu", account="lab", mem_per_cpu="4G", sbatch={"nice": 5}, profiles=PROFILES)
    monkeypatch.setenv("SBATCH_PARTITION", "of_the_surroundings")
    found = config("--profile", "debug", "--time", "60")
    assert (found.profile, found.partition, found.account, found.minutes) == ("debug", "debug", "lab", 60)
    big = config("--profile=big")
    assert (big.partition, big.nodes, big.mem, big.mem_per_cpu) == ("of_the_surroundings", 8, "100G", None)
    assert big.sbatch == {"nice": 5, "exclusive": True}
    assert f"  nodes              8                      {path}: profiles.big.nodes\n" in describe(
        asked("--profile=big")
    )


def test_the_default_profile_goes_after_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(partition="gpu", profile="debug", profiles=PROFILES)
    assert (config().partition, config().minutes) == ("debug", 30)
    assert (config("--profile", "big").partition, config("--profile", "big").minutes) == ("gpu", 1440)
    monkeypatch.setenv("SBATCH_PARTITION", "of_the_surroundings")
    assert (config().partition, config().minutes) == ("of_the_surroundings", 30)


def test_a_run_keeps_its_resources_until_a_profile_is_named() -> None:
    path = write_site(profiles=PROFILES)
    before = config("--profile", "debug", "--nodes", "2").model_dump(mode="json")
    path.unlink()
    assert config(before=before).model_dump(mode="json") == before  # also where the profile is gone
    write_site(profile="debug", profiles=PROFILES)
    found = config("--profile", "big", before=before)
    assert (found.profile, found.nodes, found.minutes, found.partition) == ("big", 8, 30, "debug")


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (
            {"profiles": PROFILES},
            ["--profile", "bgi"],
            "--profile 'bgi' is not among the profiles of {}: valid: debug, ",
        ),
        ({}, ["--profile", "big"], "--profile 'big' is not among the profiles of {}: it has none"),
        ({"profile": "x", "profiles": PROFILES}, [], "{}: profile 'x' is not among the profiles of {}: valid: debug, "),
        ({"profiles": {"a": {"nods": 1}}}, [], "{}: profiles.a: unknown key 'nods'; did you mean 'nodes'?"),
        ({"profiles": {"a": {"profile": "b"}}}, [], "{}: profiles.a: unknown key 'profile'"),
        ({"profiles": {"a": {"nodes": 0}}}, ["--profile", "a"], "{}: profiles.a.nodes is 0"),
        ({"profiles": ["a"]}, [], "{}: profiles must hold names with keys"),
        ({"profiles": {1: {}}}, [], "{}: profiles: 1 is no name"),
        ({"profiles": {"a": None}}, [], "{}: profiles must hold names with keys"),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_named(content: dict[str, Any], words: list[str], said: str) -> None:
    path = write_site(**content)
    assert said.replace("{}", str(path)) in refusal(*words)


@pytest.mark.parametrize("name", ["mem", "mem_per_cpu", "mem_per_gpu"])
def test_one_way_to_ask_for_memory_takes_the_place_of_another(name: str) -> None:
    for other in {"mem", "mem_per_cpu", "mem_per_gpu"} - {name}:
        write_site(**{other: "1G"})
        found = config(f"--{name}", "2G")
        assert (getattr(found, name), getattr(found, other)) == ("2G", None)
        before = ClusterConfig(**{other: "1G"}).model_dump(mode="json")
        assert getattr(config(f"--{name}", "2G", before=before), other) is None
        assert "exclude each other" in refusal(f"--{name}=1G", f"--{other}=2G")


def test_two_ways_to_ask_for_memory_at_once_are_refused() -> None:
    write_site(mem="1G", mem_per_gpu="2G")
    assert "mem and mem_per_gpu exclude each other" in refusal()


def test_gpus_of_gres_take_the_place_of_others_and_the_other_way_round() -> None:
    write_site(gpus_per_node=8)
    assert config("--gres", "tmpdisk:100").gpu_count == 8
    found = config("--gres", "gpu:a100:4,tmpdisk:100")
    assert (found.gpus, found.gpus_per_node, found.tasks) == ({"a100": 4}, None, 4)
    write_site(gres="gpu:a100:4,tmpdisk:100")
    found = config("--gpus_per_node", "2")
    assert (found.gpus, found.gres) == ({"": 2}, "tmpdisk:100")
    before = config().model_dump(mode="json")
    assert config("--gpus_per_node", "h100:1", before=before).gpus == {"h100": 1}
    write_site(gres="gpu:4")
    assert config("--gpus_per_node", "2").gres is None
    write_site(gres="gpu:4", gpus_per_node=4)
    assert "gpus_per_node and the GPUs of gres are the same: give one of them" in refusal()


def test_a_switch_of_sbatch_reads_alike_everywhere() -> None:
    write_site(sbatch={"hold": "true", "contiguous": True, "overcommit": False, "spread-job": "false"})
    assert config().sbatch == {"hold": True, "contiguous": True}
    assert config("--sbatch", "hold=false", "--sbatch", "contiguous=FALSE").sbatch == {}
    write_site()
    assert config("--sbatch", "hold=true").sbatch == {"hold": True}
    assert config("--sbatch", "hold").sbatch == {"hold": True}


def test_options_of_sbatch_that_bear_another_name_of_ours() -> None:
    assert config("--sbatch", "profile=task").sbatch == {"profile": "task"}


def test_after_is_for_slurm_alone(tmp_path: Path) -> None:
    assert "--after waits for jobs of Slurm, and --cluster local starts at once" in refusal(
        "--after", str(tmp_path), "--cluster", "local"
    )


def test_what_an_administrator_wrote_lies_below_what_a_user_did(tmp_path: Path) -> None:
    small = {"small": {"gpus_per_node": 1, "time": "1:00:00"}, "big": {"nodes": 2}}
    path = site_of_all(tmp_path, partition="gpu", account="all", profile="small", profiles=small)
    found = asked().config()
    assert (found.partition, found.gpus_per_node, found.time) == ("gpu", "1", "1:00:00")
    assert f"{path}: profiles.small.time" in describe(asked())
    write_site(account="mine", gpus_per_node=4, profiles={"big": {"nodes": 8}})
    found = config()
    assert (found.account, found.gpus_per_node, found.time) == ("mine", "4", "1:00:00")
    assert config("--profile", "big").nodes == 8  # the user's own of that name
    write_site(profile="big")
    assert (config().nodes, config().time) == (2, "24:00:00")  # in place of the administrator's choice
    assert config("--site", str(write_site(nodes=3))).partition is None  # a file that is named stands alone


def test_a_wrong_key_of_an_administrator_is_named_with_its_file(tmp_path: Path) -> None:
    path = site_of_all(tmp_path, partitoin="gpu")
    assert refusal().startswith(f"{path}: unknown key 'partitoin'")
