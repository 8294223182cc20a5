"""How the process of a command ends."""

from __future__ import annotations

import subprocess
import sys

ENDING = """
import atexit, sys, threading, time
from graftvit.launch import cli
from graftvit.launch.__main__ import main

class Cleared:
    def __del__(self):
        print("cleared", flush=True)

def run():
    cli.kept = Cleared()
    atexit.register(print, "exit function")
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
    print("command")
    {last}

cli.main = run
sys.exit(main())
"""


def test_a_command_ends_after_its_threads_and_exit_functions_but_clears_nothing() -> None:
    """An error that is none of ours ends as Python does."""
    for last, code, lines in (
        ("return 3", 3, ["command", "thread", "exit function"]),
        ("raise RuntimeError", 1, ["command", "thread", "exit function", "cleared"]),
    ):
        program = ENDING.format(last=last)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout.split("\n")) == (code, [*lines, ""])


def test_a_command_that_loads_torch_says_nothing_beside_its_output() -> None:
    """A library may count at the end what was not cleared, and tell of it."""
    command = [sys.executable, "-m", "graftvit.launch", "operators"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "performer" in done.stdout
    assert done.stderr == ""


def test_output_that_cannot_be_written_is_told_at_the_end() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "graftvit.launch", "recipes"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode != 0
    assert b"No space left" in done.stderr
