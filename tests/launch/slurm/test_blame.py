"""Why an attempt ended, from logs as srun and slurmstepd leave them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm.failures import Failure, Kind, is_consequence
from graftvit.launch.slurm.job_folder import Attempt, JobFolder
from graftvit.launch.slurm.judging import blame, blame_start, said_by_slurm, shorten
from support.slurm.slurm_folders import submitted

LOST = (
    "RuntimeError: [/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:2982. "
    "This is typically caused by a remote worker crashing. Check the logs."
)
KILLED = """\
srun: error: gpu2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=50410827.0
slurmstepd-gpu1: error: *** STEP 50410827.0 ON gpu1 CANCELLED AT 2026-11-22T17:55:59 ***
srun: error: gpu2: task 2: Terminated
srun: error: gpu1: tasks 0-1: Terminated
srun: Force Terminated StepId=50410827.0
"""
NODE = """\
srun: error: gpu1: task 1: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=42374659.0
slurmstepd-gpu1: error: *** STEP 42374659.0 ON gpu1 CANCELLED AT 2026-11-22T17:57:59 ***
srun: error: gpu1: task 0: Terminated
srun: error: Node failure on gpu2
srun: Force Terminated StepId=42374659.0
slurmstepd-gpu1: error: *** JOB 42374659 ON gpu1 CANCELLED AT 2026-11-22T17:58:23 DUE TO NODE FAILURE, SEE ... ***
"""
MEMORY = """\
slurmstepd: error: Detected 1 oom_kill event in StepId=77.0. Some of the step tasks have been OOM Killed.
srun: error: gpu1: task 1: Out Of Memory
srun: Terminating StepId=77.0
"""
UNRUNNABLE = """\
srun: error: gpu2: tasks 2-3: Exited with exit code 127
srun: launch/slurm: _step_signal: Terminating StepId=50410833.0
slurmstepd-gpu1: error: *** STEP 50410833.0 ON gpu1 CANCELLED AT 2026-11-22T17:55:59 ***
srun: error: gpu1: tasks 0-1: Killed
"""
PREEMPTED = """\
srun: Job step aborted: Waiting up to 32 seconds for job step to finish.
slurmstepd-gpu1: error: *** JOB 9 ON gpu1 CANCELLED AT 2026-11-22T17:58:23 DUE TO PREEMPTION ***
srun: error: gpu1: tasks 0-1: Killed
"""
GONE = """\
the copy of the code is gone, submit again: /scratch/run/jobs/code-602ead684ecb
srun: error: gpu1: tasks 0-1: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=50410833.0
"""


@pytest.mark.parametrize(
    ("log", "state", "why", "rank"),
    [
        (KILLED, "failed", "rank 3 on gpu2 was killed (signal 9), as the system does where memory runs out", 3),
        (NODE, "node failed", "node failure: gpu2", None),
        (MEMORY, "failed", "out of memory: the system killed rank 1 on gpu1", 1),
        (KILLED.replace("Killed", "Bus error"), "failed", "rank 3 on gpu2: Bus error", 3),
        (UNRUNNABLE, "failed", "rank 2 on gpu2 could not run the interpreter (exit code 127)", 2),
        (PREEMPTED, "", "", None),
        (GONE, "", "", None),
        ("epoch 1: task 3: Killed by the teacher\n", "", "", None),
    ],
)  # fmt: skip
def test_what_slurm_wrote(log: str, state: str, why: str, rank: int | None) -> None:
    found = said_by_slurm(f"{LOST}\n{log}")
    assert (found.state, found.why, found.rank) == (state, why, rank)


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (LOST, True),
        ("RuntimeError: [pair.cc:545] Read error [10.0.0.1]:8: Connection reset by peer", True),
        (
            "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:20, unhandled system error",
            True,
        ),
        ("ValueError: loss is not finite", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False),
        ("FileNotFoundError: /data/gloop", False),
        ("graftvit: Connection closed by peer, as this is no error of python", True),
        ("RuntimeError: NCCL\nLast error:\nsocketProgress: closed", True),
    ],
)
def test_errors_that_only_follow_from_another(error: str, consequence: bool) -> None:
    assert is_consequence(error) == consequence
    assert (
        is_consequence(f"Traceback\nOSError: Connection closed by peer\n\nduring it\n{error}") == consequence
    )


def test_a_lost_connection_is_said_shortly() -> None:
    assert shorten(LOST) == "RuntimeError: Connection closed by peer [127.0.0.1]:2982"


def attempted(files: JobFolder, **changes: Any) -> Attempt:
    name = files.begin(job_id="12", restart=0, nodes=["gpu1"], world_size=4, log_start=0)
    files.note(name, outcome="failed", **changes)
    return files.attempts()[-1]


def fails(files: JobFolder, rank: int, kind: Kind, error: str, moment: int) -> None:
    name = files.attempts()[0].name
    files.write_failure(name, Failure(rank, kind, False, f"Traceback\n{error}\n"))
    os.utime(files.folder / "errors" / f"{name}-{rank}.txt", (moment, moment))


def found(files: JobFolder, attempt: Attempt, until: int | None = None) -> tuple[str, int | None]:
    submission = files.submission()
    assert submission is not None
    blamed = blame(files, attempt, submission, until)
    return blamed.why, blamed.rank


def test_a_cause_goes_before_what_follows_from_it_and_slurm_before_both(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    attempt = attempted(files)
    fails(files, 0, "consequence", LOST, 1)
    fails(files, 2, "consequence", LOST, 2)
    assert found(files, attempt) == ("rank 0 lost another: " + shorten(LOST), 0)
    fails(files, 1, "cause", "ValueError: boom", 3)  # the last one to write, and the only one with a cause
    assert found(files, attempt) == ("ValueError: boom", 1)
    (tmp_path / "logs" / "12_0_log.err").write_text(KILLED)
    assert found(files, attempt)[1] == 3


def test_an_interpreter_that_does_not_run_is_told_with_its_last_line(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    attempt = attempted(files)
    (tmp_path / "logs" / "12_0_log.err").write_text(UNRUNNABLE)
    (tmp_path / "logs" / "12_2_log.err").write_text("env: 'python': No such file or directory\n\n")
    why, rank = found(files, attempt)
    assert why.endswith("(exit code 127): env: 'python': No such file or directory")
    assert rank == 2


def test_the_log_of_an_earlier_attempt_is_not_that_of_this_one(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    (tmp_path / "logs" / "12_0_log.err").write_text(NODE + KILLED)
    first = attempted(files)
    second = attempted(files, log_start=len(NODE))
    assert found(files, first, len(NODE)) == ("node failure: gpu2", None)
    assert found(files, second)[1] == 3


def test_a_start_without_an_attempt_is_told_by_its_log(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    submission = files.submission()
    assert submission is not None
    assert blame_start(submission).why == ""
    (tmp_path / "logs" / "12_0_log.err").write_text(f"old words\n{PREEMPTED}{GONE}")
    blamed = blame_start(submission)
    assert blamed.why == GONE.splitlines()[0]
    assert "Exited with exit code 1" in blamed.words
