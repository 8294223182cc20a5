"""What an editor, a type checker and a page of documentation know of the public names."""

from __future__ import annotations

import inspect
import json
import logging
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
from graftvit.transfer.align import LAYER_LOSSES
from graftvit.transfer.loss_config import DualSettings, EntrySettings, LossEntry, MethodName, TransferConfig
from graftvit.transfer.methods.loss_terms import OF_DUAL
from graftvit.transfer.methods.method_facts import METHODS
from graftvit.transfer.mode_config import MatchName
from graftvit.transfer.setting import Section, is_section

SCRIPT = Path(__file__).with_name("typed_user.py")
WIDER = {"method", "layers", "heads", "losses"}
"""Settings that Python takes in more forms than a recipe, or that have words for an editor."""


def test_the_keywords_of_dual_vit_are_the_settings() -> None:
    assert {*get_type_hints(DualSettings), "method"} == set(OF_DUAL)
    assert get_type_hints(EntrySettings).keys() == LossEntry.model_fields.keys()
    for keywords, section in ((DualSettings, TransferConfig), (EntrySettings, LossEntry)):
        for name, kind in get_type_hints(keywords).items():
            assert name in WIDER or kind == section.model_fields[name].annotation, name


def test_the_choices_are_named() -> None:
    assert set(get_args(MatchName)) == LAYER_LOSSES.keys()
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


def read_by_griffe(thing: Any) -> Any:
    """Return a public name as its source file shows it to pages of documentation."""
    griffe = pytest.importorskip("griffe")
    thing = inspect.unwrap(thing)
    path = Path(str(inspect.getsourcefile(thing)))
    return griffe.visit(thing.__module__, path, path.read_text())[thing.__qualname__]


def described(found: Any, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Return the sections of a docstring, which describes each argument and gives griffe nothing to say."""
    with caplog.at_level(logging.INFO):
        sections = {each.kind.value: each for each in found.docstring.parse("google")}
    assert not caplog.records
    words = {each.name.lstrip("*"): each.description for each in sections["parameters"].value}
    assert [name for name in words if words[name]] == [
        each.name for each in found.parameters if each.name != "self"
    ]
    return sections


@pytest.mark.parametrize("name", graftvit.__all__)
def test_a_public_name_describes_each_argument(name: str, caplog: pytest.LogCaptureFixture) -> None:
    thing = getattr(graftvit, name)
    if isinstance(thing, type) and issubclass(thing, Section):
        fields = thing.model_fields.values()
        assert all(
            each.description or (is_section(each.annotation) and each.annotation.__doc__) for each in fields
        )
        return
    found = read_by_griffe(thing)
    sections = described(found, caplog)
    assert "raises" in sections
    assert found.is_class or "returns" in sections or "eturn" in sections["text"].value.splitlines()[0]


@pytest.mark.parametrize("package", [models, transfer])
def test_the_functions_of_a_package_describe_each_argument(
    package: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    functions = [getattr(package, name) for name in package.__all__ if name not in graftvit.__all__]
    for function in filter(inspect.isfunction, functions):
        described(read_by_griffe(function), caplog)
        assert "    Raises " not in str(function.__doc__), function
