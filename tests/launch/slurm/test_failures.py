"""Which rank failed by itself, by the words that torch really uses."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from graftvit.checkpoints.atomic import WriteFailedError
from graftvit.launch.slurm.failures import Failure, classify, read_failure
from graftvit.models.errors import ConfigError, DataError, LostLoaderError, RunFailedError
from graftvit.transfer.engine.fence import FencedError
from torch import OutOfMemoryError
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2251, {}, NCCL version 2.27.5\n{}: {}\nLast error:\n"
LOST = [
    RuntimeError(
        "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:15489: Connection reset by peer. This is typically "
        "caused by a remote worker hanging or bugs in the application."
    ),
    RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2245"),
    RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"),
    RuntimeError("[gloo/transport/tcp/pair.cc:150] Application timeout caused pair closure"),
    RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error"),
    DistNetworkError("The client socket has timed out after 1000ms while trying to connect to (127.0.0.1, 29617)."),
    DistNetworkError(
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
    ),
    DistStoreError("Timed out after 2 seconds waiting for clients. 1/2 clients joined."),
    DistStoreError("wait timeout after 1000ms, keys: /x"),
    DistBackendError(
        NCCL.format(
            "remote process exited or there was a network error",
            "ncclRemoteError",
            "A call failed possibly due to a network error or a remote process exiting prematurely.",
        )
    ),
    DistBackendError(
        NCCL.format("unhandled system error", "ncclSystemError", "System call (e.g. socket, malloc) failed")
    ),
    DistBackendError("NCCL communicator was aborted on rank 1."),
    RuntimeError("NCCL communicator was aborted on rank 1.  Original reason for failure was: [Rank 1] Watchdog caught"),
]  # fmt: skip
LASTING = [
    ConfigError("optim.blr is wrong"),
    DataError("train/ has no images"),
    RunFailedError("loss is not finite at step 7"),
    FencedError("job 12 has taken over the run"),
    ZeroDivisionError("division by zero"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/data"),
    OSError(errno.ENOSPC, "No space left on device", "/data"),
    PermissionError(errno.EACCES, "Permission denied", "/data"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    DistBackendError(NCCL.format("invalid usage", "ncclInvalidUsage", "This usually reflects invalid usage.")
                     + "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"),
]  # fmt: skip
PASSING = [
    OSError(errno.ESTALE, "Stale file handle", "/data/a.jpg"),
    OSError(errno.EIO, "Input/output error", "/scratch/me"),
    OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/scratch/me"),
    OSError(
        "Caught OSError in DataLoader worker process 0.\nOSError: [Errno 116] Stale file handle: '/data/x'"
    ),
    RuntimeError("Error while deserializing header: Input/output error (os error 5)"),
    LostLoaderError("a loader process died (DataLoader worker (pid 4997) is killed by signal: Killed. )"),
    RuntimeError("DataLoader worker (pid(s) 4997) exited unexpectedly"),
    RuntimeError("DataLoader worker (pid 4997) is killed by signal: Killed. "),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    DistNetworkError(
        "The server socket has failed to listen on any local network address. port: 29619, useIpv6: false, code: -98, "
        "name: EADDRINUSE, message: address already in use"
    ),
    DistBackendError(
        NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Call to CUDA function failed.")
    ),
]
MEMORY = [
    OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_what_is_said_of_a_rank_that_is_gone(error: Exception) -> None:
    assert classify(error, saved=False) == ("consequence", True)


@pytest.mark.parametrize("error", LASTING, ids=str)
def test_what_will_come_again(error: Exception) -> None:
    assert classify(error, saved=True) == ("cause", False)


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_may_pass(error: Exception) -> None:
    assert classify(error, saved=False) == ("cause", True)


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_memory_that_was_enough_for_a_state_may_be_enough_again(error: Exception) -> None:
    assert classify(error, saved=True) == ("cause", True)
    assert classify(error, saved=False) == ("cause", False)


def raised(error: Exception, after: Exception, *, told: bool) -> Exception:
    """`error` as it comes out of the handler of another one."""
    try:
        try:
            raise after
        except Exception as before:
            if told:
                raise error from before
            raise error from None
    except Exception as found:
        return found


def test_a_sentence_of_ours_on_a_disk_that_is_away() -> None:
    away = OSError(errno.ESTALE, "Stale file handle", "/scratch/me")
    sentence = WriteFailedError("last.safetensors cannot be written: Stale file handle")
    assert classify(raised(sentence, away, told=True), saved=False) == ("cause", True)
    assert classify(raised(ConfigError("x"), away, told=False), saved=False) == ("cause", False)


def test_an_attempt_that_was_replaced_is_never_tried_again() -> None:
    away = OSError(errno.ESTALE, "Stale file handle", "/scratch/me")
    replaced = raised(FencedError("another attempt has taken over the run"), away, told=True)
    assert classify(replaced, saved=False) == ("cause", False)


@pytest.mark.parametrize("kind", ["cause", "consequence"])
@pytest.mark.parametrize("transient", [True, False])
def test_a_file_keeps_words_and_kind(tmp_path: Path, kind: str, transient: bool) -> None:
    made = Failure(3, kind, transient, "Traceback\nValueError: boom (cause)\n")  # type: ignore[arg-type]
    path = tmp_path / "0001-77_4.2-3.txt"
    path.write_text(made.to_text())
    read = read_failure(path)
    assert (read.rank, read.kind, read.transient, read.text) == (3, kind, transient, made.text)
    assert read.last_words == "ValueError: boom (cause)"
    assert read.written > 0


def test_a_file_of_before_is_a_cause(tmp_path: Path) -> None:
    path = tmp_path / "0001-3.txt"
    path.write_text("ValueError: boom\n")
    read = read_failure(path)
    assert (read.rank, read.kind, read.transient, read.text) == (3, "cause", False, "ValueError: boom\n")
