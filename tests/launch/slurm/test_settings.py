"""What is asked of a cluster: flags, profiles, surroundings, site files, defaults, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.flags import command_parser
from graftvit.launch.slurm.setting_layers import ONLY_IN_THE_SITE_FILE, add_cluster_flags, describe, site_file
from graftvit.launch.slurm.settings import (
    ClusterConfig,
    gpus_in,
    has_gpus,
    parse_gpus,
    parse_time,
    sbatch_fields,
    without_gpus,
)
from graftvit.models.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from support.slurm.cluster_users import asked, refusal, write_site
from support.slurm.slurm_cluster import SlurmCluster


def config(*words: str, before: dict[str, Any] | None = None) -> ClusterConfig:
    return asked(*words, before=before).config()


def test_what_a_run_asked_for_before_wins_over_the_site_file() -> None:
    write_site(partition="gpu", account="lab")
    found = config("--nodes", "2", before={"partition": "old", "nodes": 8, "reservation": "r"})
    assert (found.partition, found.account, found.nodes) == ("old", "lab", 2)
    assert found.reservation == "r"


def test_where_the_site_file_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site_file() == home / "xdg" / "graftvit" / "cluster.yaml"
    monkeypatch.setenv("HOME", str(home / "me"))
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    assert site_file() == home / "me" / ".config" / "graftvit" / "cluster.yaml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert site_file() == home / "me" / ".config" / "graftvit" / "cluster.yaml"


def test_another_site_file_is_taken_instead(tmp_path: Path) -> None:
    write_site(partition="gpu", account="lab")
    other = tmp_path / "other.yaml"
    other.write_text("partition: cpu\n")
    found = config("--site", str(other))
    assert (found.partition, found.account) == ("cpu", None)
    assert str(tmp_path / "none.yaml") in refusal("--site", str(tmp_path / "none.yaml"))


def test_an_empty_site_file_says_nothing() -> None:
    site_file().parent.mkdir(parents=True)
    site_file().write_text("# partition: gpu\n")
    assert config() == ClusterConfig()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("partiton: gpu", "unknown key 'partiton'; did you mean 'partition'?"),
        ("1: gpu", "unknown key 1"),
        ("- partition", "must hold keys and values"),
        ("gpu", "must hold keys and values"),
        ("partition: [", "cannot be read"),
        ("nodes: 1\nnodes: 2", "'nodes' is given twice"),
        ("nodes: 0", "nodes is 0"),
        ("nodes: many", "nodes is 'many'"),
        ("nodes: true", "nodes is True"),
        ("gpus_per_node: -1", "gpus_per_node is -1"),
        ("tasks_per_node: 0", "tasks_per_node is 0"),
        ("cpus_per_task: 0", "cpus_per_task is 0"),
        ("array_parallelism: 0", "array_parallelism is 0"),
        ("signal_delay: 0", "signal_delay is 0"),
        ("cluster: pbs", "cluster is 'pbs'"),
        ("time: soon", "time is 'soon'"),
        ("time: 0", "time is 0: '0' leaves no time to run"),
        ("time:", "time is None"),
        ("mem: lots", "mem is 'lots'"),
        ("mem: 1.5G", "mem is '1.5G'"),
        ("partition: [a, b]", "partition is ['a', 'b']"),
        ("setup: 5", "setup is 5: give a line, or a list of lines"),
        ("setup: {a: b}", "setup is {'a': 'b'}: give a line, or a list of lines"),
        ("node_setup: [export A: b]", "node_setup is [{'export A': 'b'}]: give a line, or a list of lines"),
        ("shared_folders: 5", "shared_folders is 5"),
        ("sbatch: [exclusive]", "sbatch is ['exclusive']"),
        ("sbatch: exclusive", "sbatch is 'exclusive'"),
        ("sbatch: {time: 5}", "time has a flag and a key of its own, --time"),
        ("sbatch: {cpus-per-task: 5}", "cpus_per_task has a flag and a key of its own"),
        ("sbatch: {no-requeue: true}", "no-requeue follows from what the run needs"),
        ("partition: \xff\xfe", "is damaged: it is no UTF-8 text"),
    ],
)
def test_a_wrong_site_file_is_named_with_its_key(content: str, words: str) -> None:
    path = write_site()
    path.write_bytes(content.encode("latin-1"))
    said = refusal()
    assert str(path) in said
    assert words in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes is '0'"),
        (["--nodes", "two"], "--nodes is 'two'"),
        (["--gpus-per-node=-2"], "--gpus_per_node is '-2'"),
        (["--time", "1-"], "--time is '1-'"),
        (["--time", "5m"], "--time is '5m'"),
        (["--mem", "240 GB"], "--mem is '240 GB'"),
        (["--signal_delay", "1m"], "--signal_delay is '1m'"),
        (["--cluster", "pbs"], "--cluster"),
        (["--sbatch", "=5"], "--sbatch '=5'"),
        (["--sbatch", "mail-type="], "--sbatch 'mail-type='"),
        (["--sbatch", "signal=USR1@10"], "signal follows from what the run needs"),
        (["--sbatch=--partition=gpu"], "partition has a flag and a key of its own, --partition"),
        (["--partitoin", "gpu"], "partitoin"),
        (["--shared_folders", "/scratch"], "shared_folders"),
        (["--partition"], "--partition"),
        (["--partition", "main,"], "--partition is 'main,': a name, or names with commas between them"),
        (["--mail", "never"], "--mail is 'never': valid are one address and NONE, BEGIN, END"),
        (["--mail", "@"], "--mail is '@': valid are one address and NONE"),
        (["--mail", "me@"], "--mail is 'me@': valid are one address and NONE"),
        (["--gres", "gpu:"], "--gres is 'gpu:': give names"),
        (["--gres", ":3"], "--gres is ':3': give names"),
        (["--gres", "gpu:a100:"], "--gres is 'gpu:a100:': give names"),
        (["--gres", ""], "--gres is '': give names"),
        (["--time", "9999999999"], "--time is '9999999999': a limit is 24855 days at most"),
        (["--time", "35791395"], "--time is '35791395': a limit is 24855 days at most"),
        (["--signal_delay", "65536"], "--signal_delay is '65536'"),
        (["--after", ""], "--after: '' is not a folder"),
        (["--sbatch", "ni ce=5"], "'ni ce' is no name of an option"),
        (["--sbatch", "nice=5\n#SBATCH --hold"], "it must be one line"),
        (["--comment", "a\0b"], "--comment is 'a\\x00b': it must be one line"),
        *[
            ([f"--{name}", "a\nb"], f"--{name} is 'a\\nb': it must be one line")
            for name in (*sbatch_fields(), "container", "container_mounts", "mail")
        ],
    ],
)
def test_a_wrong_flag_is_named_with_its_value(words: list[str], said: str) -> None:
    write_site(partition="gpu")
    found = refusal(*words)
    assert said in found
    assert "cluster.yaml" not in found


def test_every_resource_has_a_flag_but_those_of_the_site() -> None:
    parser = command_parser("submit", "", [])
    add_cluster_flags(parser)
    flags = {name for name in ClusterConfig.model_fields if f"--{name}" in parser._option_string_actions}
    assert flags == set(ClusterConfig.model_fields) - set(ONLY_IN_THE_SITE_FILE)


def test_other_options_of_sbatch() -> None:
    write_site(
        sbatch={"mail-user": "me@x", "mail-type": "END", "exclusive": True, "hold": False, "nice": 100}
    )
    found = config("--sbatch", "mail-type=FAIL,END", "--sbatch=--wckey=a=b", "--sbatch", "contiguous")
    assert found.sbatch == {
        "mail_user": "me@x", "mail_type": "FAIL,END", "exclusive": True, "nice": 100,
        "wckey": "a=b", "contiguous": True,
    }  # fmt: skip
    again = ClusterConfig.model_validate(found.model_dump(mode="json"))  # as `graftvit jobs resume` reads it
    assert again == found


def test_lines_of_setup() -> None:
    write_site(setup="module purge\nmodule load cuda")
    assert config().setup == ("module purge", "module load cuda")
    write_site(setup=["module load cuda", "source 'my env/bin/activate'"])
    assert config().setup[1] == "source 'my env/bin/activate'"
    assert config("--setup", "a b", "--setup=export X=--y").setup == ("a b", "export X=--y")


def test_shared_folders_as_people_write_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORKDIR", "/lustre/me")
    write_site(shared_folders=["~/runs", "$WORKDIR/x", "/scratch"])
    assert config().shared_folders == (Path("/home/me/runs"), Path("/lustre/me/x"), Path("/scratch"))
    write_site(shared_folders="/scratch")
    assert config().shared_folders == (Path("/scratch"),)


def test_numbers_that_are_names() -> None:
    write_site(account=1234, time=90, mem=4000)
    site_file().write_text("account: 007\ntime: 1:30:00\nqos: no\nmem: 4000\nconstraint: 1e3\n")
    found = config()
    assert (found.account, found.minutes, found.qos, found.mem) == ("007", 90, "no", "4000")


@pytest.mark.parametrize(("line", "size"), [("8", 16), ("8 --tasks_per_node 1", 2), ("0", 2)])
def test_tasks_are_one_a_gpu(line: str, size: int) -> None:
    assert config("--nodes", "2", "--gpus_per_node", *line.split()).world_size == size


TIMES = {
    "1": 1, "59": 59, "60": 60, "0:30": 1, "1:00": 1, "1:01": 2, "90:00": 90, "1:00:00": 60, "1:00:01": 61, "0:0:1": 1,
    "2-0": 2880, "2-12": 3600, "1-2:30": 1590, "1-2:30:15": 1591, "0-0:0:59": 1, "99:99:99": 6041, "365-0": 525600,
}  # fmt: skip
NO_TIMES = ("+5", "1_0", " 5", "1:2:3:4", "1-2:3:4:5", "abc", "5m", "1.5", "", "1-1-", "5:", ":5", "1-5:")
REFUSED_BY_US = ("0", "0:0", "1-", "-5", "-1", "UNLIMITED", "0-0", "١", "1\n")
"""Slurm takes these: without a limit, or as what nobody means."""


@pytest.mark.parametrize(("text", "minutes"), TIMES.items())
def test_notations_of_time(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", [*NO_TIMES, *REFUSED_BY_US])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_time(text)


@given(st.integers(0, 400), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_times_are_rounded_up_to_minutes(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = days * 86400 + hours * 3600 + minutes * 60 + seconds
    if total == 0:
        return
    whole = parse_time(f"{days}-{hours:02}:{minutes:02}:{seconds:02}")
    assert 0 <= whole * 60 - total < 60
    if days == 0:
        assert parse_time(f"{hours}:{minutes}:{seconds}") == whole
    if seconds == 0:
        assert parse_time(f"{days}-{hours}:{minutes}") == whole
        assert days or hours or parse_time(str(minutes)) == whole


@given(st.text(alphabet="0123456789:- ", max_size=9))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    try:
        minutes = parse_time(text)
    except ConfigError as error:
        minutes, said = None, str(error)
    assert repr(text) in said if minutes is None else minutes > 0


@pytest.mark.slurm
def test_slurm_reads_times_alike(cluster: SlurmCluster) -> None:
    for text, minutes in TIMES.items():
        words = ("--hold", "--parsable", "-o", "/dev/null", "--time", text, "--wrap", "true")
        job = cluster.run("sbatch", *words).strip()
        shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
        limit = next(word for word in shown.split() if word.startswith("TimeLimit=")).partition("=")[2]
        assert parse_time(limit) == minutes, text
        cluster.run("scancel", job)


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("4", {"": 4}), ("0", {"": 0}), ("a100:4", {"a100": 4}), ("a100:2,h100:1", {"a100": 2, "h100": 1}),
     ("nvidia_a100-sxm4-80gb:8", {"nvidia_a100-sxm4-80gb": 8})],
)  # fmt: skip
def test_gpus_as_they_are_asked_for(text: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(text) == gpus


@pytest.mark.parametrize(
    "text", ["", "a100", "a100:", ":4", "-1", "a100:4,a100:2", "4,", "a b:1", "1.5", "a:b:1", "٤"]
)
def test_what_are_no_gpus(text: str) -> None:
    with pytest.raises(ValueError, match="as in a100:4"):
        parse_gpus(text)


@pytest.mark.parametrize(
    ("gres", "gpus", "rest"),
    [
        (None, {}, None), ("(null)", {}, None), ("gpu", {"": 1}, None), ("gpu:2", {"": 2}, None),
        ("gpu:a100", {"a100": 1}, None), ("gpu:a100:4,tmpdisk:100", {"a100": 4}, "tmpdisk:100"),
        ("gres/gpu:2", {"": 2}, None), ("gpu_mem:40,gpus:2", {}, "gpu_mem:40,gpus:2"),
        ("gpu:a100:4(S:0-1,3),gpu:h100:2(S:2)", {"a100": 4, "h100": 2}, None),
    ],
)  # fmt: skip
def test_gpus_among_generic_resources(gres: str | None, gpus: dict[str, int], rest: str | None) -> None:
    assert gpus_in(gres) == gpus
    if gres is not None and "(" not in gres:
        assert without_gpus(gres) == rest


@pytest.mark.parametrize(
    ("gpus", "wanted", "enough"),
    [
        ({"a100": 4}, {"": 4}, True), ({"a100": 4}, {"": 5}, False), ({"a100": 4}, {"A100": 4}, True),
        ({"a100": 4}, {"h100": 1}, False), ({"a100": 4, "h100": 1}, {"a100": 4, "h100": 1}, True),
        ({"": 4}, {"a100": 1}, False), ({}, {"": 0}, True), ({"a100": 2, "h100": 2}, {"": 4}, True),
    ],
)  # fmt: skip
def test_whether_a_node_has_them(gpus: dict[str, int], wanted: dict[str, int], enough: bool) -> None:
    assert has_gpus(gpus, wanted) is enough


A100 = {"gpus_per_node": "a100:4", "gpu_bind": "closest"}


@pytest.mark.parametrize(
    ("asked", "tasks", "options"),
    [
        ({}, 1, {"gpus_per_node": "1"}),
        ({"gpus_per_node": 0, "gpu_bind": "closest", "mem_per_gpu": "9G"}, 1, {}),
        (A100, 4, A100),
        ({"gres": "gpu:a100:4,tmpdisk:9"}, 4, {"gres": "gpu:a100:4,tmpdisk:9"}),
        ({"gres": "tmpdisk:9"}, 1, {"gres": "tmpdisk:9", "gpus_per_node": "1"}),
        ({"gres": "gpu:2", "tasks_per_node": 1, "mem_per_gpu": "9G"}, 1, {"gres": "gpu:2", "mem_per_gpu": "9G"}),
    ],
)  # fmt: skip
def test_processes_and_options_that_follow(
    asked: dict[str, Any], tasks: int, options: dict[str, str]
) -> None:
    config = ClusterConfig(**asked)
    assert (config.tasks, config.options()) == (tasks, options)


@pytest.mark.parametrize(
    ("mail", "options"),
    [
        ("me@example.org", {"mail_type": "END,FAIL", "mail_user": "me@example.org"}),
        ("fail", {"mail_type": "FAIL"}),
        ("FAIL,me@example.org,requeue", {"mail_type": "FAIL,REQUEUE", "mail_user": "me@example.org"}),
    ],
)
def test_mail(mail: str, options: dict[str, str]) -> None:
    assert ClusterConfig(gpus_per_node=0, mail=mail).options() == options
    found = ClusterConfig(gpus_per_node=0, mail=mail, sbatch={"mail-type": "ALL"})
    assert found.options()["mail_type"] == "ALL"


@pytest.mark.parametrize(
    "text",
    ["gpu", "gpu:2", "gpu:a100", "gpu:a100:4,tmpdisk:100", "gres/gpu:2", "gpu:1g.5gb:2", "gpu:3090:1, x", "none",
     "tmpdisk:100G"],
)  # fmt: skip
def test_generic_resources_as_slurm_takes_them(text: str) -> None:
    assert ClusterConfig(gres=text).gres == text


def site_of_all(tmp_path: Path, **values: Any) -> Path:
    """What an administrator wrote."""
    path = tmp_path / "all" / "graftvit" / "cluster.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_flag_wins_over_the_surroundings_and_those_over_the_site_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (config(), config().tasks, config().world_size, config().minutes) == (ClusterConfig(), 1, 1, 1440)
    write_site(partition="site", account="site", qos="site", nodes=4)
    for name in ("PARTITION", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "surroundings")
    found = config("--partition", "flag", "--mem=200G")
    assert (found.partition, found.account, found.qos, found.nodes) == ("flag", "surroundings", "site", 4)
    assert (found.mem, found.reservation) == ("200G", None)


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
    ("value", "option"), [("", True), ("yes", True), ("1", True), ("user", "user"), ("0", None), ("no", None)]
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
        ({"profiles": PROFILES}, ["--profile", "bgi"], "--profile 'bgi' is not among the profiles of {}: valid: "),
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
    for word in ("hold=true", "hold"):
        assert config("--sbatch", word).sbatch == {"hold": True}
    assert config("--sbatch", "profile=task").sbatch == {"profile": "task"}  # bears another name of ours


def test_after_is_for_slurm_alone(tmp_path: Path) -> None:
    said = refusal("--after", str(tmp_path), "--cluster", "local")
    assert "--after waits for jobs of Slurm, and --cluster local starts at once" in said


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
