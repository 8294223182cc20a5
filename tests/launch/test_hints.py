"""Hints survive a shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

from graftvit.launch.hints import hint


def test_a_shell_takes_a_hint_as_it_was_meant() -> None:
    folder = Path("/a b/lr=1e-3,seed=0/it's $HOME;x")
    script = f'graftvit() {{ printf "%s\\n" "$@"; }}; {hint("jobs", folder, "--lines", 3)}'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["jobs", str(folder), "--lines", "3"]


def test_a_plain_folder_stays_plain() -> None:
    assert (
        hint("resume", Path("/scratch/me/cells/lr=1,seed=0"))
        == "graftvit resume /scratch/me/cells/lr=1,seed=0"
    )
