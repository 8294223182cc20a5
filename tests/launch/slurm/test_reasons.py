"""Slurm's reasons in plain words, with Slurm's own beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from graftvit.launch.slurm.judging import launch_failure, waiting


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "waits for nodes: Resources"),
        ("QOSMaxJobsPerUserLimit", "waits until fewer of your jobs run: QOSMaxJobsPerUserLimit"),
        ("AssocGrpGRES", "waits for a limit of your account or QOS: AssocGrpGRES"),
        ("AssocGrpCPUMinutesLimit", "waits for a limit of your account or QOS: AssocGrpCPUMinutesLimit"),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[1-4]",
            "waits for nodes that are down, drained or reserved: ReqNodeNotAvail, UnavailableNodes:n[1-4]",
        ),
        ("SomethingNew", "waits: SomethingNew"),
        ("", ""),
    ],
)
def test_why_a_job_waits(reason: str, words: str) -> None:
    assert waiting(reason) == words


def test_a_begin_time_is_said() -> None:
    assert re.fullmatch(r"waits until .*\d\d:\d\d:\d\d: BeginTime", waiting("BeginTime", 1.8e9))
    assert waiting("BeginTime") == "waits until its begin time: BeginTime"


def test_a_folder_that_the_nodes_cannot_see_is_named() -> None:
    folder = Path("/scratch/run")
    for reason, code in (
        ("JobLaunchFailure", "0:53"),
        ("RaisedSignal:53(Real-time_signal_19)", "0:53"),
        ("", "0:53"),
    ):
        assert str(folder) in launch_failure(reason, code, folder)
    assert launch_failure("NonZeroExitCode", "1:0", folder) == ""
