"""Where the values come from: flags, profiles, surroundings and site files; and what this machine alone can tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.flags import command_parser
from graftvit.launch.slurm import site_file as module
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.site_file import (
    ONLY_IN_THE_SITE_FILE,
    add_cluster_flags,
    check_folder,
    describe,
    site_file,
)
from graftvit.models.errors import ConfigError
from support.slurm.cluster_users import asked as config
from support.slurm.cluster_users import refusal, write_site


def test_where_the_site_file_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site_file() == home / "xdg" / "graftvit" / "cluster.yaml"
    monkeypatch.setenv("HOME", str(home / "me"))
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    assert site_file() == home / "me" / ".config" / "graftvit" / "cluster.yaml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert site_file() == home / "me" / ".config" / "graftvit" / "cluster.yaml"
    assert f"{home}/none.yaml" in refusal("--site", f"{home}/none.yaml")


def test_every_resource_has_a_flag_but_those_of_the_site() -> None:
    parser = command_parser("submit", "", [])
    add_cluster_flags(parser)
    flags = {name for name in Request.model_fields if f"--{name}" in parser._option_string_actions}
    assert flags == set(Request.model_fields) - set(ONLY_IN_THE_SITE_FILE)


def test_a_flag_wins_over_what_was_asked_before_over_the_surroundings_and_those_over_the_site_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (config(), config().tasks, config().world_size, config().minutes) == (Request(), 1, 1, 1440)
    write_site(partition="site", account="site", qos="site", constraint="site", nodes=4)
    for name in ("PARTITION", "ACCOUNT", "QOS"):
        monkeypatch.setenv(f"SBATCH_{name}", "surroundings")
    old = {"partition": "old", "account": "old", "nodes": 8, "reservation": "r"}
    found = config("--partition", "flag", "--mem=200G", before=old)
    taken = (found.partition, found.account, found.qos, found.constraint)
    assert taken == ("flag", "old", "surroundings", "site")
    assert (found.mem, found.nodes, found.reservation) == ("200G", 8, "r")


SURROUNDINGS = {
    "SBATCH_GPUS_PER_NODE": ("gpus_per_node", "a100:4"),
    "SBATCH_GRES": ("gres", "tmpdisk:100"),
    "SBATCH_MEM_PER_CPU": ("mem_per_cpu", "4G"),
    "SBATCH_MEM_PER_NODE": ("mem", "240G"),
    "SBATCH_TIMELIMIT": ("time", "1-00:00:00"),
}


@pytest.mark.parametrize("variable", SURROUNDINGS)
def test_what_sbatch_takes_from_the_surroundings(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = SURROUNDINGS[variable]
    monkeypatch.setenv(variable, "")
    assert config() == Request()
    monkeypatch.setenv(variable, value)
    assert config() == Request(**{name: value})
    assert f"  {name:<18} {value:<22} {variable}\n" in describe(config())


@pytest.mark.parametrize(
    ("value", "option"), [("", True), ("yes", True), ("1", True), ("user", "user"), ("0", None), ("no", None)]
)
def test_options_of_the_surroundings_without_a_value(
    value: str, option: bool | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_EXCLUSIVE", value)
    assert config().sbatch == ({} if option is None else {"exclusive": option})


def test_other_variables_of_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    write_site(sbatch={"wckey": "of_the_site", "nice": 5})
    monkeypatch.setenv("SBATCH_WCKEY", "of_the_surroundings")
    assert config().sbatch == {"wckey": "of_the_surroundings", "nice": 5}
    assert "  wckey              of_the_surroundings    SBATCH_WCKEY\n" in describe(config())
    monkeypatch.setenv("SBATCH_TIMELIMIT", "soon")
    assert refusal().startswith("SBATCH_TIMELIMIT is 'soon': ")
    assert config("--time", "60").minutes == 60


def test_each_value_is_shown_with_its_origin() -> None:
    path = write_site(partition="gpu", shared_folders=["/scratch"], setup=["module load cuda", "umask 002"])
    assert describe(config("--nodes", "2", "--sbatch", "mail-type=END")) == (
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
    assert f"  nodes              8                      {path}: profiles.big.nodes\n" in describe(big)


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
        ({"profiles": PROFILES}, ["--profile", "bgi"], "--profile 'bgi' is not among the profiles of {}: valid: "),
        ({}, ["--profile", "big"], "--profile 'big' is not among the profiles of {}: it has none"),
        ({"profile": "x", "profiles": PROFILES}, [], "{}: profile 'x' is not among the profiles of {}: valid: debug, "),
        ({"profiles": {"a": {"nods": 1}}}, [], "{}: profiles.a: unknown key 'nods'; did you mean 'nodes'?"),
        ({"profiles": {"a": {"profile": "b"}}}, [], "{}: profiles.a: unknown key 'profile'"),
        ({"profiles": {"a": {"nodes": 0}}}, ["--profile", "a"], "{}: profiles.a.nodes is 0"),
        ({"profiles": ["a"]}, [], "{}: profiles must hold names with keys"),
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
        before = Request(**{other: "1G"}).model_dump(mode="json")
        assert getattr(config(f"--{name}", "2G", before=before), other) is None
        assert "exclude each other" in refusal(f"--{name}=1G", f"--{other}=2G")
    write_site(mem="1G", mem_per_gpu="2G")  # at once
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


def test_after_is_for_slurm_alone(tmp_path: Path) -> None:
    said = refusal("--after", str(tmp_path), "--cluster", "local")
    assert "--after waits for jobs of Slurm, and --cluster local starts at once" in said


def test_what_an_administrator_wrote_lies_below_what_a_user_did(tmp_path: Path) -> None:
    small = {"small": {"gpus_per_node": 1, "time": "1:00:00"}, "big": {"nodes": 2}}
    path = tmp_path / "all" / "graftvit" / "cluster.yaml"
    path.parent.mkdir(parents=True)
    of_all = {"partition": "gpu", "account": "all", "profile": "small", "profiles": small}
    path.write_text(yaml.safe_dump(of_all, sort_keys=False))
    found = config()
    assert (found.partition, found.gpus_per_node, found.time) == ("gpu", "1", "1:00:00")
    assert f"{path}: profiles.small.time" in describe(config())
    write_site(account="mine", gpus_per_node=4, profiles={"big": {"nodes": 8}})
    found = config()
    assert (found.account, found.gpus_per_node, found.time) == ("mine", "4", "1:00:00")
    assert config("--profile", "big").nodes == 8  # the user's own of that name
    write_site(profile="big")
    assert (config().nodes, config().time) == (2, "24:00:00")  # in place of the administrator's choice
    (tmp_path / "other.yaml").write_text("nodes: 3\n")
    assert config("--site", f"{tmp_path}/other.yaml") == Request(nodes=3)  # one that is named stands alone
    path.write_text("partitoin: gpu\n")
    assert refusal().startswith(f"{path}: unknown key 'partitoin'")


def test_folders_that_nodes_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Request(shared_folders=(tmp_path / "scratch",))
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    for inside in ("scratch/new/run", "scratch", "link/run"):
        check_folder(tmp_path / inside, shared)
    with pytest.raises(ConfigError, match="has a %, which Slurm replaces"):
        check_folder(tmp_path / "scratch" / "50%job", shared)
    for outside in ("scratch2", "scratch/../run"):
        with pytest.raises(ConfigError, match="in none of the folders"):
            check_folder(tmp_path / outside, shared)
    monkeypatch.setattr(module, "TEMPORARY", ())
    check_folder(tmp_path / "run", Request())
    for kind in ("tmpfs", "ramfs"):
        monkeypatch.setattr(module, "_file_system", lambda _, kind=kind: kind)
        with pytest.raises(ConfigError, match="on this machine alone"):
            check_folder(tmp_path / "run", Request())


def test_the_file_system_of_a_folder_that_is_yet_to_be_made() -> None:
    assert module._file_system(Path("/proc/self/new/folder")) == "proc"
    if os.path.ismount("/dev/shm"):
        assert module._file_system(Path("/dev/shm/new/folder")) == "tmpfs"
