"""Hints survive a shell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from graftvit.launch.say import hint

LAUNCH = Path(__file__).parents[2] / "launch"


def test_a_shell_takes_a_hint_as_it_was_meant() -> None:
    folder = Path("/a b/lr=1e-3,seed=0/it's $HOME;x")
    script = f'graftvit() {{ printf "%s\\n" "$@"; }}; {hint("jobs", folder, "--lines", 3)}'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["jobs", str(folder), "--lines", "3"]


def test_a_plain_folder_stays_plain() -> None:
    assert (
        hint("jobs", "resume", Path("/scratch/me/cells/lr=1,seed=0"))
        == "graftvit jobs resume /scratch/me/cells/lr=1,seed=0"
    )


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.py")), ids=lambda path: str(path.relative_to(LAUNCH)))
def test_commands_with_values_in_them_are_hints(path: Path) -> None:
    """An f-string that puts a folder into `graftvit jobs FOLDER` by itself does not quote it."""
    unquoted = re.findall(
        r"graftvit [a-z]+ [^\"'`]*\{(?!shlex\.quote|hint\()[^}]*\}", path.read_text(encoding="utf-8")
    )
    assert not unquoted
