"""Runs `graftvit` commands as processes of their own, forked from one that has imported torch and the package already.

A fresh Python spends five seconds of a core on these imports. Otherwise such a command is what a shell would start:
it has its own number, session, environment, folder, umask and output, and Python ends it in the usual way.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from support.runs.patience import PATIENCE, until

IMPORTED = ("timm", "accelerate", "graftvit.launch.cli", "graftvit.launch.slurm.submit",
            "graftvit.launch.slurm.stop", "graftvit.transfer.engine.train")  # fmt: skip
LONGEST = 1 << 20
TESTS = str(Path(__file__).resolve().parents[2])
WITHOUT_TEST = dict(os.environ)
"""The environment of the server: that of a test may name a cluster, with whose end all processes that name it end."""


class Command:
    """A command that was started; as much of `subprocess.Popen` as tests need."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        ours, theirs = socket.socketpair()
        umask = os.umask(0)
        os.umask(umask)
        asked = {"words": list(words), "env": dict(env), "cwd": str(cwd), "umask": umask}
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the command)
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._answers = ours
        with theirs:
            files = [self._out.fileno(), self._err.fileno(), theirs.fileno()]
            socket.send_fds(_server(), [json.dumps(asked).encode()], files)
        self._words = list(words)
        self.pid = self._answer()
        self.returncode: int | None = None

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait for the end, and return what the command wrote to its two outputs."""
        if self.returncode is None:
            self._answers.settimeout(timeout)
            self.returncode = os.waitstatus_to_exitcode(self._answer())
            self._answers.close()
        return _read(self._out), _read(self._err)

    def kill_at(self, moment: Callable[[], bool]) -> None:
        """Kill the command at a moment, unless it ends before."""
        until(
            lambda: moment() or bool(select.select([self._answers], [], [], 0)[0]), "the moment", every=0.01
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.communicate()

    def _answer(self) -> int:
        try:
            return array.array("i", self._answers.recv(4))[0]
        except (TimeoutError, IndexError) as error:
            raise AssertionError(f"graftvit {' '.join(self._words)} does not end: {error!r}") from None


def _read(file: IO[bytes]) -> str:
    """Read from the start, without the position that a process which the command left behind writes at."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def run(words: Sequence[str], env: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = Command(words, env, cwd)
    out, err = command.communicate()
    assert command.returncode is not None
    return subprocess.CompletedProcess(["graftvit", *words], command.returncode, out, err)


@functools.cache
def _server() -> socket.socket:
    """Start the process that forks the commands; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
    with theirs:
        number = theirs.fileno()
        env = {**WITHOUT_TEST, "PYTHONPATH": os.pathsep.join([TESTS, WITHOUT_TEST.get("PYTHONPATH", "")])}
        process = subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number], env=env)
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Return in the fork what it is to do, and in this process None after the last request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets the keepers
    while True:
        message, files, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not message:
            return None
        if os.fork() == 0:
            requests.close()
            asked = dict(json.loads(message))
            if _keep(files):
                return {**asked, "files": files}
        for file in files:
            os.close(file)


def _keep(files: list[int]) -> bool:
    """Fork a command and tell its number and its end; return in the command alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (child := os.fork()) == 0:
        return True
    answers = socket.socket(fileno=files[2])
    with contextlib.suppress(OSError):  # whoever asked may have gone
        answers.sendall(array.array("i", [child]))
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(OSError):
        answers.sendall(array.array("i", [status]))
    os._exit(0)


def _become(asked: dict[str, Any]) -> None:
    """Make this process what `python -m graftvit.launch` would be, in a terminal of its own, and run the command."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, err, answers = asked["files"]
    for file, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(file, number)
        os.close(file)
    os.close(answers)
    os.umask(asked["umask"])
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    if "OMP_NUM_THREADS" in os.environ:  # torch read it when it was imported
        importlib.import_module("torch").set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path[0] = asked["cwd"]
    sys.path.remove(TESTS)
    sys.argv = ["graftvit", *asked["words"]]
    _end(_run_main())


def _run_main() -> int:
    try:
        runpy.run_module("graftvit.launch", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but leave the memory of the imports as it is: to free it copies it, in two seconds."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.disable()  # to import makes no garbage
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # or each fork copies what the collector marks
    gc.enable()
    if (request := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        _become(request)
    os._exit(0)  # without the two seconds in which Python clears its modules
