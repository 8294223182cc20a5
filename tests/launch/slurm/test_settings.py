"""Flags, site file and defaults of what is asked of a cluster: which wins, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.flags import command_parser
from graftvit.launch.slurm.setting_layers import ONLY_IN_THE_SITE_FILE, add_cluster_flags, site_file
from graftvit.launch.slurm.settings import ClusterConfig, parse_time, sbatch_fields
from graftvit.models.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from support.slurm.cluster_users import asked, refusal, write_site
from support.slurm.slurm_cluster import SlurmCluster


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path


def config(*words: str, before: dict[str, Any] | None = None) -> ClusterConfig:
    return asked(*words, before=before).config()


def test_defaults_without_any_file() -> None:
    assert config() == ClusterConfig()
    assert (config().tasks, config().world_size, config().minutes) == (1, 1, 1440)


def test_a_flag_wins_over_the_site_file_and_that_over_the_defaults() -> None:
    write_site(partition="gpu", nodes=4, account="lab", mem="100G")
    found = config("--nodes", "8", "--mem=200G")
    assert (found.partition, found.account, found.nodes, found.mem) == ("gpu", "lab", 8, "200G")
    assert found.qos is None


def test_what_a_run_asked_for_before_wins_over_the_site_file() -> None:
    write_site(partition="gpu", account="lab")
    found = config("--nodes", "2", before={"partition": "old", "nodes": 8, "reservation": "r"})
    assert (found.partition, found.account, found.nodes) == ("old", "lab", 2)
    assert found.reservation == "r"


def test_where_the_site_file_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site_file() == home / "xdg" / "graftvit" / "cluster.yaml"
    monkeypatch.setenv("HOME", str(home / "me"))
    for unset in (
        lambda: monkeypatch.setenv("XDG_CONFIG_HOME", ""),
        lambda: monkeypatch.delenv("XDG_CONFIG_HOME"),
    ):
        unset()
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
    ],
)
def test_a_wrong_site_file_is_named_with_its_key(content: str, words: str) -> None:
    path = write_site()
    path.write_text(content)
    said = refusal()
    assert str(path) in said
    assert words in said


def test_a_site_file_that_is_no_text() -> None:
    path = write_site()
    path.write_bytes(b"partition: \xff\xfe")
    assert f"{path} is damaged: it is no UTF-8 text" in refusal()


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
    flags = {name for name in ClusterConfig.model_fields if f"--{name}" in command_flags()}
    assert flags == set(ClusterConfig.model_fields) - set(ONLY_IN_THE_SITE_FILE)


def command_flags() -> set[str]:
    parser = command_parser("submit", "", [])
    add_cluster_flags(parser)
    return set(parser._option_string_actions)


def test_other_options_of_sbatch() -> None:
    write_site(
        sbatch={"mail-user": "me@x", "mail-type": "END", "exclusive": True, "hold": False, "nice": 100}
    )
    found = config("--sbatch", "mail-type=FAIL,END", "--sbatch=--wckey=a=b", "--sbatch", "contiguous")
    assert found.sbatch == {
        "mail_user": "me@x", "mail_type": "FAIL,END", "exclusive": True, "nice": 100,
        "wckey": "a=b", "contiguous": True,
    }  # fmt: skip
    again = ClusterConfig.model_validate(found.model_dump(mode="json"))  # as `graftvit resume` reads it
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


def test_tasks_are_one_a_gpu() -> None:
    assert config("--nodes", "2", "--gpus_per_node", "8").world_size == 16
    assert config("--nodes", "2", "--gpus_per_node", "8", "--tasks_per_node", "1").world_size == 2
    assert config("--nodes", "2", "--gpus_per_node", "0").world_size == 2


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
        said = cluster.run(
            "sbatch", "--hold", "--parsable", "-o", "/dev/null", "--time", text, "--wrap", "true"
        )
        shown = cluster.run("scontrol", "--oneliner", "show", "job", said.strip())
        limit = next(word for word in shown.split() if word.startswith("TimeLimit=")).partition("=")[2]
        assert parse_time(limit) == minutes, text
        cluster.run("scancel", said.strip())
