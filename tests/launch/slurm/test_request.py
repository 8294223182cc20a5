"""What is asked of a cluster: what each resource may be, what is said of a wrong one, and what follows for sbatch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm.request import PASSED, Request, gpus_in, parse_gpus, parse_time, without_gpus
from graftvit.launch.slurm.site_file import site_file
from graftvit.models.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from support.slurm.cluster_users import asked as config
from support.slurm.cluster_users import refusal, write_site
from support.slurm.slurm_cluster import SlurmCluster


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("partiton: gpu", "unknown key 'partiton'; did you mean 'partition'?"),
        ("1: gpu", "unknown key 1"),
        ("- partition", "must hold keys and values"),
        ("partition: [", "cannot be read"),
        ("nodes: 1\nnodes: 2", "'nodes' is given twice"),
        ("nodes: 0", "nodes is 0"),
        ("nodes: true", "nodes is True"),
        ("gpus_per_node: -1", "gpus_per_node is -1"),
        ("cluster: pbs", "cluster is 'pbs'"),
        ("time: 0", "time is 0: '0' leaves no time to run"),
        ("time:", "time is None"),
        ("partition: [a, b]", "partition is ['a', 'b']"),
        ("setup: 5", "setup is 5"),
        ("node_setup: [export A: b]", "node_setup is [{'export A': 'b'}]"),
        ("shared_folders: 5", "shared_folders is 5"),
        ("sbatch: exclusive", "sbatch is 'exclusive'"),
        ("sbatch: {cpus-per-task: 5}", "cpus_per_task has a flag and a key of its own, --cpus_per_task"),
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
        (["--time", "5m"], "--time is '5m'"),
        (["--cluster", "pbs"], "--cluster"),
        (["--sbatch", "=5"], "follows from what"),
        (["--sbatch=--partition=gpu"], "partition has a flag and a key of its own, --partition"),
        (["--partitoin", "gpu"], "partitoin"),
        (["--shared_folders", "/scratch"], "shared_folders"),
        (["--signal_delay", "65536"], "--signal_delay is '65536'"),
        (["--after", ""], "--after: '' is not a folder"),
        (["--sbatch", "nice=5\n#SBATCH --hold"], "it must be one line"),
        (["--comment", "a\0b"], "--comment is 'a\\x00b': "),
        *[
            ([f"--{name}", "a\nb"], f"--{name} is 'a\\nb': it must be one line")
            for name in (*PASSED, "container", "container_mounts", "mail")
        ],
    ],
)
def test_a_wrong_flag_is_named_with_its_value(words: list[str], said: str) -> None:
    write_site(partition="gpu")
    found = refusal(*words)
    assert said in found
    assert "cluster.yaml" not in found


def test_values_as_people_write_them_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORKDIR", "/lustre/me")
    write_site(setup="module purge\nmodule load cuda", shared_folders=["~/runs", "$WORKDIR/x", "/scratch"])
    assert config().setup == ("module purge", "module load cuda")
    assert config().shared_folders == (Path("/home/me/runs"), Path("/lustre/me/x"), Path("/scratch"))
    write_site(setup=["module load cuda", "source 'my env/bin/activate'"], shared_folders="/scratch")
    assert config().setup[1] == "source 'my env/bin/activate'"
    assert config().shared_folders == (Path("/scratch"),)
    assert config("--setup", "a b", "--setup=export X=--y").setup == ("a b", "export X=--y")
    site_file().write_text("account: 007\ntime: 1:30:00\nqos: no\nmem: 4000\nconstraint: 1e3\n")
    found = config()
    assert (found.account, found.minutes, found.qos, found.mem) == ("007", 90, "no", "4000")
    site_file().write_text("# partition: gpu\n")
    assert config() == Request()


def test_other_options_of_sbatch() -> None:
    write_site(
        sbatch={"mail-user": "me@x", "mail-type": "END", "exclusive": True, "hold": False, "nice": 100}
    )
    found = config("--sbatch", "mail-type=FAIL,END", "--sbatch=--wckey=a=b", "--sbatch", "contiguous")
    assert found.sbatch == {
        "mail_user": "me@x", "mail_type": "FAIL,END", "exclusive": True, "nice": 100,
        "wckey": "a=b", "contiguous": True,
    }  # fmt: skip
    again = Request.model_validate(found.model_dump(mode="json"))  # as `graftvit jobs resume` reads it
    assert again == found


def test_a_switch_of_sbatch_reads_alike_everywhere() -> None:
    write_site(sbatch={"hold": "true", "contiguous": True, "overcommit": False, "spread-job": "false"})
    assert config().sbatch == {"hold": True, "contiguous": True}
    assert config("--sbatch", "hold=false", "--sbatch", "contiguous=FALSE").sbatch == {}
    assert config("--sbatch", "profile=task").sbatch["profile"] == "task"  # bears another name of ours


TIMES = {
    "1": 1, "59": 59, "60": 60, "0:30": 1, "1:00": 1, "1:01": 2, "90:00": 90, "1:00:00": 60, "1:00:01": 61, "0:0:1": 1,
    "2-0": 2880, "2-12": 3600, "1-2:30": 1590, "1-2:30:15": 1591, "0-0:0:59": 1, "99:99:99": 6041, "365-0": 525600,
}  # fmt: skip
NO_TIMES = ("+5", "1_0", " 5", "1:2:3:4", "1-2:3:4:5", "abc", "5m", "1.5", "", "1-1-", "5:", ":5", "1-5:")
REFUSED_BY_US = ("0", "0:0", "1-", "-5", "-1", "UNLIMITED", "0-0", "١", "1\n")
"""Slurm takes these: without a limit, or as what nobody means."""


def test_notations_of_time() -> None:
    assert {text: parse_time(text) for text in TIMES} == TIMES
    for text in (*NO_TIMES, *REFUSED_BY_US):
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


@pytest.mark.slurm
def test_slurm_reads_times_alike(cluster: SlurmCluster) -> None:
    for text, minutes in TIMES.items():
        words = ("--hold", "--parsable", "-o", "/dev/null", "--time", text, "--wrap", "true")
        job = cluster.run("sbatch", *words).strip()
        shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
        limit = next(word for word in shown.split() if word.startswith("TimeLimit=")).partition("=")[2]
        assert parse_time(limit) == minutes, text
        cluster.run("scancel", job)


def test_gpus_as_they_are_asked_for() -> None:
    assert parse_gpus("0") == {"": 0}
    assert parse_gpus("a100:2,nvidia_a100-sxm4-80gb:8") == {"a100": 2, "nvidia_a100-sxm4-80gb": 8}
    for text in ("", "a100", "a100:", ":4", "-1", "a100:4,a100:2", "4,", "a b:1", "1.5", "a:b:1", "٤"):
        with pytest.raises(ValueError, match="as in a100:4"):
            parse_gpus(text)


@pytest.mark.parametrize(
    ("gres", "gpus", "rest"),
    [
        (None, {}, None), ("gpu", {"": 1}, None), ("gpu:2", {"": 2}, None), ("gpu:a100", {"a100": 1}, None),
        ("gpu:a100:4,tmpdisk:100", {"a100": 4}, "tmpdisk:100"), ("gres/gpu:2", {"": 2}, None),
        ("gpu_mem:40,gpus:2", {}, "gpu_mem:40,gpus:2"), ("gpu:1g.5gb:2", {"1g.5gb": 2}, None),
        ("gpu:3090:1, x", {"3090": 1}, "x"), ("none", {}, "none"), ("tmpdisk:100G", {}, "tmpdisk:100G"),
    ],
)  # fmt: skip
def test_generic_resources_as_slurm_takes_them(
    gres: str | None, gpus: dict[str, int], rest: str | None
) -> None:
    assert Request(gres=gres).gres == gres
    assert gpus_in(gres) == gpus
    assert without_gpus(gres or "") == rest


A100 = {"gpus_per_node": "a100:4", "gpu_bind": "closest"}


@pytest.mark.parametrize(
    ("asked", "tasks", "options"),
    [
        ({}, 1, {"gpus_per_node": "1"}),
        ({"gpus_per_node": 0, "gpu_bind": "closest", "mem_per_gpu": "9G"}, 1, {}),
        (A100, 4, A100),
        ({**A100, "tasks_per_node": 1}, 1, A100),
        ({"gres": "gpu:a100:4,tmpdisk:9"}, 4, {"gres": "gpu:a100:4,tmpdisk:9"}),
        ({"gres": "tmpdisk:9"}, 1, {"gres": "tmpdisk:9", "gpus_per_node": "1"}),
        ({"gres": "gpu:2", "tasks_per_node": 1, "mem_per_gpu": "9G"}, 1, {"gres": "gpu:2", "mem_per_gpu": "9G"}),
    ],
)  # fmt: skip
def test_processes_and_options_that_follow(
    asked: dict[str, Any], tasks: int, options: dict[str, str]
) -> None:
    request = Request(nodes=2, **asked)
    assert (request.tasks, request.world_size, request.options()) == (tasks, 2 * tasks, options)


@pytest.mark.parametrize(
    ("mail", "options"),
    [
        ("me@example.org", {"mail_type": "END,FAIL", "mail_user": "me@example.org"}),
        ("fail", {"mail_type": "FAIL"}),
        ("FAIL,me@x,requeue,you@x", {"mail_type": "FAIL,REQUEUE", "mail_user": "me@x,you@x"}),
    ],
)
def test_mail(mail: str, options: dict[str, str]) -> None:
    assert Request(gpus_per_node=0, mail=mail).options() == options
    found = Request(gpus_per_node=0, mail=mail, sbatch={"mail-type": "ALL"})
    assert found.options()["mail_type"] == "ALL"
