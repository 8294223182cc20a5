"""Runs whose processes are forked: each scenario in a fork of one server, which has only imported.

A scenario is `main` of a module beside this file; what it gives is a report that JSON can hold.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

TESTS = Path(__file__).resolve().parents[2]
LONGEST = 300
"""Seconds until a scenario that hangs is ended."""


NEEDS_FSDP = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU"
)


class RunScenario(Protocol):
    def __call__(self, module: str, *arguments: object) -> dict[str, Any]: ...


@contextmanager
def scenario_server() -> Iterator[RunScenario]:
    """Start the server; a report holds under `stderr` the end of what the scenario wrote there."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        [sys.executable, "-m", "support.runs.scenarios"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
    ) as server:  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def run(module: str, *arguments: object) -> dict[str, Any]:
            errors.seek(0)
            errors.truncate()
            requests.write(json.dumps([module, *arguments], default=str) + "\n")
            requests.flush()
            answer: dict[str, Any] = json.loads(answers.readline())
            errors.seek(0)
            said = errors.read()[-4000:]
            assert "report" in answer, f"{answer.get('error')}\n{said}"
            return {**answer["report"], "stderr": said}

        yield run


def serve() -> None:
    """Answer each request of stdin with a line on stdout."""
    for request in sys.stdin:
        module, *arguments = json.loads(request)
        gc.disable()  # to import makes no garbage
        main = importlib.import_module(f"support.runs.{module}").main
        gc.freeze()  # or each fork copies what the collector marks
        gc.enable()
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST)
            _answer(main, arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.stdout.write(json.dumps({"error": f"the scenario ended with {code}"}) + "\n")
            sys.stdout.flush()


def _answer(main: Any, arguments: list[Any]) -> None:
    try:
        answer = {"report": main(*arguments)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    serve()
