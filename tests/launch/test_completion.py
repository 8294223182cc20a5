"""The script of `graftvit completion`, as a shell uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.cli import COMMANDS
from graftvit.launch.load_config import recipe_names
from support.runs.typed import Typed

ASK = """
source {script}
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_shtab_graftvit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_bash_completes_commands_flags_values_recipes_and_files(typed: Typed, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    script = tmp_path / "script"
    script.write_text(typed("completion", "bash").out)

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", ASK.format(script=script), "bash", "graftvit", *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split()

    assert complete("") == [*COMMANDS]
    assert {*recipe_names(), "mine.yaml"} <= {*complete("train", "")}
    assert complete("train", "mine.yaml", "--met") == ["--method", "--metric"]
    assert "align" in complete("train", "--mode", "")
    assert complete("submit", "mine.yaml", "--bl") == ["--blr"]
    assert complete("export", "mi") == ["mine.yaml"]
    assert complete("programs", "bench", "r") == ["run"]
    assert complete("jobs", "stop", "--no") == ["--now"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_command_and_recipe(shell: str, typed: Typed) -> None:
    script = typed("completion", shell).out
    assert all(name in script for name in (*COMMANDS, *recipe_names(), "--output_dir"))


def test_without_the_package_the_command_says_what_installs_it(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "needs shtab, not installed: pip install 'shtab>=" in typed("completion", "bash", code=2).err
