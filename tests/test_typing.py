"""What an editor and a type checker know of the public names."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import graftvit
import pytest
from graftvit import cfgs, checkpoints, launch, models, transfer
from graftvit.checkpoints.pretrained import LoadSettings, load_pretrained
from graftvit.transfer.loss_config import DualSettings, EntrySettings, LossEntry, MethodName, TransferConfig
from graftvit.transfer.methods.loss_terms import OF_DUAL
from graftvit.transfer.methods.method_facts import METHODS

SCRIPT = Path(__file__).with_name("typed_user.py")
WIDER = {"method", "layers", "heads", "losses"}
"""Settings that Python takes in more forms than a recipe, or that have words for an editor."""


def test_the_keywords_of_dual_vit_are_the_settings() -> None:
    assert {*get_type_hints(DualSettings), "method"} == set(OF_DUAL)
    assert get_type_hints(EntrySettings).keys() == LossEntry.model_fields.keys()
    for keywords, section in ((DualSettings, TransferConfig), (EntrySettings, LossEntry)):
        for name, kind in get_type_hints(keywords).items():
            assert name in WIDER or kind == section.model_fields[name].annotation, name


def test_the_methods_are_named() -> None:
    ours = {name for name, facts in METHODS.items() if facts.module}
    assert set(get_args(MethodName)) == ours


def test_the_keywords_of_load_are_those_of_load_pretrained() -> None:
    own = inspect.get_annotations(inspect.unwrap(load_pretrained), eval_str=True)
    assert get_type_hints(LoadSettings) == {k: v for k, v in own.items() if k not in ("source", "return")}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the user's script beside the package, however that is installed."""
    folder = tmp_path_factory.mktemp("user")
    package = folder / "graftvit"
    package.mkdir()
    assert graftvit.__file__ is not None
    for name in ("__init__.py", "__init__.pyi", "py.typed"):
        shutil.copy(Path(graftvit.__file__).with_name(name), package)
    each: ModuleType
    for each in (cfgs, checkpoints, launch, models, transfer):
        (package / each.__name__.rpartition(".")[2]).symlink_to(Path(str(each.__file__)).parent)
    return Path(shutil.copy(SCRIPT, folder))


def refused(script: Path, *command: str) -> dict[int, str]:
    """Return the findings of a type checker in the script by line."""
    done = subprocess.run([*command, script.name], cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found: dict[int, str] = {}
    if "--outputjson" in command:
        for each in json.loads(done.stdout)["generalDiagnostics"]:
            found[each["range"]["start"]["line"] + 1] = each["message"]
        return found
    for line in done.stdout.splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry["severity"] == "error":
            assert entry["file"] == script.name
            found[entry["line"]] = entry["message"]
    return found


def marked() -> set[int]:
    return {number for number, line in enumerate(SCRIPT.read_text().splitlines(), 1) if "# wrong" in line}


@pytest.mark.slow
def test_mypy_refuses_the_wrong_lines_and_no_other(script: Path) -> None:
    pytest.importorskip("mypy")
    found = refused(
        script, sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--output=json",
        "--config-file=", f"--cache-dir={script.parent / 'cache'}",
    )  # fmt: skip
    assert found.keys() == marked(), found


@pytest.mark.slow
def test_pyright_refuses_the_wrong_lines_and_no_other(script: Path) -> None:
    command = shutil.which("pyright") or pytest.skip("pyright is not installed")
    found = refused(script, command, "--outputjson", f"--pythonpath={sys.executable}")
    assert found.keys() == marked(), found
