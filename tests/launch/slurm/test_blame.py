"""Why an attempt ended and which rank failed by itself: from logs, records and errors as they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.atomic import WriteFailedError
from graftvit.launch.slurm.failures import (
    blame,
    blame_start,
    classify,
    is_consequence,
    said_by_slurm,
    said_of,
)
from graftvit.launch.slurm.folder import Attempt, Failure, Job, JobFolder, Kind, read_failure
from graftvit.models.errors import ConfigError, LostLoaderError
from graftvit.transfer.engine.fence import FencedError
from support.slurm.slurm_folders import submitted
from torch import OutOfMemoryError
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

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


NODE_ALONE = NODE.replace("srun: error: Node failure on gpu2\n", "")
"""Where srun died with the node."""
TIME = PREEMPTED.replace("PREEMPTION", "TIME LIMIT")


@pytest.mark.parametrize(
    ("log", "state", "why", "rank", "node"),
    [
        (KILLED, "failed", "rank 3 on gpu2 was killed (signal 9)", 3, "gpu2"),
        (NODE, "node failed", "node failure: gpu2", None, ""),
        (NODE_ALONE, "node failed", "node failure", None, ""),
        (MEMORY, "failed", "out of memory: the system killed rank 1 on gpu1", 1, "gpu1"),
        (MEMORY.splitlines()[0], "failed", "out of memory", None, ""),
        (KILLED.replace("Killed", "Bus error"), "failed", "rank 3 on gpu2: Bus error", 3, "gpu2"),
        (UNRUNNABLE, "failed", "rank 2 on gpu2 could not run the interpreter (exit code 127)", 2, "gpu2"),
        (UNRUNNABLE.replace("127", "126"), "failed", "rank 2 on gpu2 could not run the interpreter (exit code 126)", 2,
         "gpu2"),
        (PREEMPTED, "preempted", "preemption", None, ""),
        (TIME, "timed out", "time limit", None, ""),
        (PREEMPTED.replace("PREEMPTION", "JOB REQUEUE"), "", "", None, ""),
        (GONE, "", "", None, ""),
        ("epoch 1: task 3: Killed by the teacher\n", "", "", None, ""),
    ],
)  # fmt: skip
def test_what_slurm_wrote(log: str, state: str, why: str, rank: int | None, node: str) -> None:
    found = said_by_slurm(f"{LOST}\n{log}")
    assert (found.state, found.why, found.rank, found.node) == (state, why, rank, node)
    assert found.transient == ("interpreter" not in why)
    assert LOST not in found.text


@pytest.mark.parametrize(
    ("error", "consequence"),
    [
        (LOST, True),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:20, unhandled", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", False),
        ("graftvit: Connection closed by peer, as this is no error of python", True),
        ("RuntimeError: NCCL\nLast error:\nsocketProgress: closed", True),
    ],
)
def test_errors_that_only_follow_from_another(error: str, consequence: bool) -> None:
    assert is_consequence(error) == consequence
    before = "Traceback\nOSError: Connection closed by peer\n\nduring it\n"
    assert is_consequence(before + error) == consequence


def failed(files: JobFolder, **changes: Any) -> Attempt:
    name = files.begin(job_id="12", restart=0, nodes=["gpu1"], world_size=4, log_start=0)
    files.note(name, outcome="failed", **changes)
    return files.attempts()[-1]


def fails(files: JobFolder, rank: int, kind: Kind, error: str, moment: int) -> None:
    name = files.attempts()[0].name
    files.write_failure(name, Failure(rank, kind, False, f"Traceback\n{error}\n"))
    os.utime(files.folder / "errors" / f"{name}-{rank}.txt", (moment, moment))


def job_of(files: JobFolder) -> Job:
    job = files.job()
    assert job is not None
    return job


def found(files: JobFolder, attempt: Attempt, until: int | None = None) -> tuple[str, int | None]:
    blamed = blame(files, attempt, job_of(files), until)
    return blamed.why, blamed.rank


def test_a_cause_goes_before_what_follows_from_it_and_slurm_before_both(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    attempt = failed(files)
    fails(files, 0, "consequence", LOST, 1)
    fails(files, 2, "consequence", LOST, 2)
    shortly = "RuntimeError: Connection closed by peer [127.0.0.1]:2982"
    assert found(files, attempt) == (f"rank 0 lost another: {shortly}", 0)
    fails(files, 1, "cause", "ValueError: boom", 3)  # the last one to write, and the only one with a cause
    assert found(files, attempt) == ("ValueError: boom", 1)
    (tmp_path / "logs" / "12_0_log.err").write_text(KILLED)
    assert found(files, attempt)[1] == 3


def test_the_log_of_an_earlier_attempt_is_not_that_of_this_one(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    (tmp_path / "logs" / "12_0_log.err").write_text(NODE + KILLED)
    first = failed(files)
    second = failed(files, log_start=len(NODE))
    assert found(files, first, len(NODE)) == ("node failure: gpu2", None)
    assert found(files, second)[1] == said_of(second, job_of(files)).rank == 3
    unknown = failed(files, log_start=None)  # where its part begins
    assert said_of(unknown, job_of(files)).why == ""


def test_a_start_without_an_attempt_is_told_by_its_log(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    job = job_of(files)
    assert blame_start(job).why == ""
    (tmp_path / "logs" / "12_0_log.err").write_text(f"old words\n{PREEMPTED}{GONE}")
    blamed = blame_start(job)
    assert blamed.why == GONE.splitlines()[0]
    assert "Exited with exit code 1" in blamed.text
    assert blame_start(job, first=False).why == "", "other lines may be of an earlier start"


def test_of_ranks_without_records_the_loudest_is_one_with_a_cause(tmp_path: Path) -> None:
    files = submitted(tmp_path)
    files.begin(job_id="12", restart=0, nodes=["gpu1"], world_size=2, log_start=0)
    for moment, (rank, error) in enumerate(((0, LOST), (1, "ValueError: boom"))):
        log = tmp_path / "logs" / f"12_{rank}_log.err"
        log.write_text(f"Traceback\n{error}\n")
        os.utime(log, (moment, moment))
    assert found(files, files.attempts()[-1])[1] == 1


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2251, {}, NCCL version 2.27.5\n{}: {}\nLast error:\n"
OTHERS = [
    RuntimeError(
        "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:15489: Connection reset by peer. This is typically "
        "caused by a remote worker hanging or bugs in the application."
    ),
    RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2245"),
    RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"),
    RuntimeError("[gloo/transport/tcp/pair.cc:150] Application timeout caused pair closure"),
    RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error"),
    DistNetworkError("The client socket has timed out after 1000ms while trying to connect to (127.0.0.1, 29617)."),
    DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"),
    DistStoreError("Timed out after 2 seconds waiting for clients. 1/2 clients joined."),
    DistStoreError("wait timeout after 1000ms, keys: /x"),
    DistBackendError(NCCL.format("remote process exited or there was a network error", "ncclRemoteError",
                                 "A call failed possibly due to a network error or a remote process exiting.")),
    DistBackendError(NCCL.format("unhandled system error", "ncclSystemError", "System call (e.g. socket) failed")),
    RuntimeError("NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] Watchdog caught"),
]  # fmt: skip
LASTING = [
    ConfigError("optim.blr is wrong"),
    FencedError("job 12 has taken over the run"),
    ZeroDivisionError("division by zero"),
    OSError(errno.ENOSPC, "No space left on device", "/data"),
    RuntimeError("CUDA error: device-side assert triggered"),
    DistBackendError(NCCL.format("invalid usage", "ncclInvalidUsage", "This usually reflects invalid usage.")
                     + "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"),
]  # fmt: skip
PASSING = [
    OSError(errno.EIO, "Input/output error", "/scratch/me"),
    OSError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 116] Stale file handle: '/data/x'"),
    RuntimeError("Error while deserializing header: Input/output error (os error 5)"),
    LostLoaderError("a loader process died (DataLoader worker (pid 4997) is killed by signal: Killed. )"),
    RuntimeError("DataLoader worker (pid(s) 4997) exited unexpectedly"),
    RuntimeError("DataLoader worker (pid 4997) is killed by signal: Killed. "),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    DistNetworkError("The server socket has failed to listen on any local network address. port: 29619, useIpv6: "
                     "false, code: -98, name: EADDRINUSE, message: address already in use"),
    DistBackendError(NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Call to CUDA function failed.")),
]  # fmt: skip
TOO_MUCH = [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                 "tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"),
    MemoryError(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "after_a_save", "before"),
    [
        *((error, ("consequence", True), ("consequence", True)) for error in OTHERS),
        *((error, ("cause", False), ("cause", False)) for error in LASTING),
        *((error, ("cause", True), ("cause", True)) for error in PASSING),
        *((error, ("cause", True), ("cause", False)) for error in TOO_MUCH),
    ],
    ids=lambda each: repr(each)[:40] if isinstance(each, Exception) else "",
)
def test_what_a_rank_says(error: Exception, after_a_save: tuple[Any, bool], before: tuple[Any, bool]) -> None:
    """Of one that is gone, of what comes again, of what may pass, and of memory that sufficed for a state."""
    assert classify(error, saved=True) == after_a_save
    assert classify(error, saved=False) == before


def raised(error: Exception, after: Exception, *, told: bool) -> Exception:
    """`error` as it comes out of the handler of another one."""
    try:
        try:
            raise after
        except Exception as before:
            raise error from (before if told else None)
    except Exception as found:
        return found


@pytest.mark.parametrize(
    ("error", "told", "transient"),
    [
        (WriteFailedError("last.safetensors cannot be written: Stale file handle"), True, True),
        (ConfigError("x"), False, False),
        (FencedError("another attempt has taken over the run"), True, False),  # is never tried again
    ],
)
def test_a_sentence_of_ours_on_a_disk_that_is_away(error: Exception, told: bool, transient: bool) -> None:
    away = OSError(errno.ESTALE, "Stale file handle", "/scratch/me")
    assert classify(raised(error, away, told=told), saved=False) == ("cause", transient)


@pytest.mark.parametrize(("kind", "transient"), [("cause", True), ("cause", False), ("consequence", True)])
def test_a_file_keeps_words_and_kind(tmp_path: Path, kind: str, transient: bool) -> None:
    made = Failure(3, kind, transient, "Traceback\nValueError: boom (cause)\n")  # type: ignore[arg-type]
    path = tmp_path / "0001-77_4.2-3.txt"
    path.write_text(made.to_text())
    read = read_failure(path)
    assert (read.rank, read.kind, read.transient, read.text) == (3, kind, transient, made.text)
    assert read.last_words == "ValueError: boom (cause)"
    assert read.written > 0
    path.write_text("ValueError: boom\n")  # a file without its kind is a cause
    assert (read_failure(path).kind, read_failure(path).transient) == ("cause", False)
