"""GPUs by type, as people ask for them and as nodes have them."""

from __future__ import annotations

from typing import Any

import pytest
from graftvit.launch.slurm.settings import ClusterConfig, gpus_in, has_gpus, parse_gpus, without_gpus


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


@pytest.mark.parametrize(
    ("asked", "tasks", "options"),
    [
        ({}, 1, {"gpus_per_node": "1"}),
        ({"gpus_per_node": 0, "gpu_bind": "closest", "mem_per_gpu": "9G"}, 1, {}),
        (
            {"gpus_per_node": "a100:4", "gpu_bind": "closest"},
            4,
            {"gpus_per_node": "a100:4", "gpu_bind": "closest"},
        ),
        ({"gres": "gpu:a100:4,tmpdisk:9"}, 4, {"gres": "gpu:a100:4,tmpdisk:9"}),
        ({"gres": "tmpdisk:9"}, 1, {"gres": "tmpdisk:9", "gpus_per_node": "1"}),
        (
            {"gres": "gpu:2", "tasks_per_node": 1, "mem_per_gpu": "9G"},
            1,
            {"gres": "gpu:2", "mem_per_gpu": "9G"},
        ),
    ],
)
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
    found = ClusterConfig(gpus_per_node=0, mail=mail)
    assert found.options() == options
    assert (
        ClusterConfig(gpus_per_node=0, mail=mail, sbatch={"mail-type": "ALL"}).options()["mail_type"] == "ALL"
    )


@pytest.mark.parametrize(
    "text",
    ["gpu", "gpu:2", "gpu:a100", "gpu:a100:4,tmpdisk:100", "gres/gpu:2", "gpu:1g.5gb:2", "gpu:3090:1, x", "none",
     "tmpdisk:100G"],
)  # fmt: skip
def test_generic_resources_as_slurm_takes_them(text: str) -> None:
    assert ClusterConfig(gres=text).gres == text
