"""How the process of a command ends."""

from __future__ import annotations

import subprocess
import sys


def test_a_command_that_loads_torch_says_nothing_beside_its_output() -> None:
    """A library may count at the end what was not cleared, and tell of it."""
    command = [sys.executable, "-m", "graftvit.launch", "list", "operators"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "performer" in done.stdout
    assert done.stderr == ""


ENDING = """
import gc, sys
from graftvit.launch.garbage import collect_seldom
{library}

class Cleared:
    def __del__(self):
        print("cleared")

collect_seldom()
one = Cleared()
one.itself = one
del one
"""


def test_nothing_is_cleared_at_the_end_unless_a_library_counts_it() -> None:
    for library, printed in (("", ""), ("class nb_type_0(type): pass", "cleared\n")):
        program = ENDING.format(library=library)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == printed


def test_output_that_cannot_be_written_is_told_at_the_end() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "graftvit.launch", "list", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert b"No space left" in done.stderr
