"""The rules of the project that a reader counts on: where imports point, how long files are, what keys do."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distributions, entry_points, metadata, version
from pathlib import Path

import graftvit
import pytest
import yaml
from graftvit.launch.fields import find_key, find_stage_key, leaves, sections
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.modes import MODES
from graftvit.transfer.methods.method_facts import method_names
from settings_page import DOCS, MARKED, PAGES, SLOW_PAGES, render_settings

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["models", "checkpoints", "transfer", "launch"]
"""A package may import from those before it."""
PACKAGE_FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
OTHER_FILES = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
NOT_EMPTY = [path for path in PACKAGE_FILES + OTHER_FILES if path.read_text().strip()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


parsed = functools.cache(ast.parse)


def imported_packages(path: Path) -> set[str]:
    """The packages of the project that a file imports, from anywhere in it."""
    inside = list(path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(parsed(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("graftvit.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = inside[: len(inside) - node.level + 1]
            parts = [*above, *(node.module or "").split(".")]
            found |= {parts[0]} if parts[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "graftvit":
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way() -> None:
    for path in PACKAGE_FILES:
        package = path.relative_to(ROOT).parts[0]
        allowed = set(ORDER[: ORDER.index(package) + 1])
        assert imported_packages(path) <= allowed, name_of(path)


def test_the_import_rule_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "models" / "deep" / "wrong.py"
    path.parent.mkdir(parents=True)
    for text, package in [
        ("from ...transfer.data import x", "transfer"),
        ("from graftvit.launch import cli", "launch"),
        ("def f():\n    import graftvit.checkpoints.pretrained", "checkpoints"),
        ("from ... import launch", "launch"),
        ("from graftvit import transfer", "transfer"),
        ("from ..errors import GraftError", "models"),
        ("from .near import x", "models"),
    ]:
        path.write_text(text)
        assert imported_packages(path) == {package}, text


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in NOT_EMPTY}
    assert {name: length for name, length in lengths.items() if length > 700} == {}


def test_the_library_neither_asserts_nor_leaves_nor_runs_a_pickle() -> None:
    """The linter finds prints, breakpoints, pickles, notes of what is to do, and files without a docstring."""
    for path in PACKAGE_FILES:
        assert "raise NotImplementedError()" not in path.read_text(), path
        for node in ast.walk(parsed(path.read_text())):
            if isinstance(node, ast.Assert):
                place = f"{name_of(path)}: line {node.lineno}"
                # only to tell the type checker what the code above has made sure of
                assert re.search(r" is not None$|^isinstance\(", ast.unparse(node.test)), place
                assert node.msg is None, place
            if isinstance(node, ast.Call):
                called, place = ast.unparse(node.func), f"{path}: line {node.lineno}"
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("exit", "quit"), place
                assert called != "sys.exit" or path.parent.name == "launch", place
                assert called != "torch.load" or keywords.get("weights_only") == "True", place
            if isinstance(node, ast.Constant) and isinstance(node.value, str):  # of one cluster
                assert not node.value.startswith(
                    ("/checkpoint", "/datasets", "/private", "/scratch", "/fsx")
                ), path
                assert node.value not in ("learnfair", "devlab", "NCCL_SOCKET_IFNAME"), path


DOTTED = re.compile(
    r"(?<![\w./])(graftvit\.(?:models|checkpoints|transfer|launch)(?:\.[A-Za-z_]\w*)*)(?: import ([\w, ]+))?"
)


def test_every_name_of_the_package_in_a_text_exists() -> None:
    """In documents, docstrings, error texts, and code that tests keep as text."""
    texts = [*PACKAGE_FILES, *OTHER_FILES, *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert [
        (name_of(path), name)
        for path in texts
        for dotted, imported in DOTTED.findall(path.read_text())
        for name in [f"{dotted}.{each.split()[0]}" for each in imported.split(",") if each.strip()]
        or [dotted]
        if not _exists(name)
    ] == []


@functools.cache
def _exists(name: str) -> bool:
    """Whether it is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_version_stands_in_one_place() -> None:
    number = version("graftvit")
    places = [
        name_of(path)
        for path in [*PACKAGE_FILES, ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / "environment.yml"]
        if f'"{number}"' in path.read_text()
    ]
    assert places == ["pyproject.toml"]
    assert f"## {number}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_help_of_the_package_begins_with_what_is_public() -> None:
    """Of a class, the help also lists the hundreds of names that it inherits: they come later."""
    assert all(re.search(rf"\b{name}\b", graftvit.__doc__ or "") for name in graftvit.__all__)


IMPORT_ALL = """
import importlib, pkgutil, sys
import graftvit
names = sorted(each.name for each in pkgutil.walk_packages(graftvit.__path__, "graftvit."))
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(graftvit.__file__, *names, sep="\\n")
"""


@pytest.mark.slow
def test_a_distribution_has_every_file_and_each_module_of_its_wheel_can_be_imported(tmp_path: Path) -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("only a clone knows which files belong to it")
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = tmp_path / "sources"
    for name in listed:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    packed = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(packed, cwd=sources, capture_output=True, check=True)
    [archive] = tmp_path.glob("graftvit-*.tar.gz")
    with tarfile.open(archive) as file:
        assert {f"graftvit-{version('graftvit')}/{name}" for name in listed} <= set(file.getnames())
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path),
    ]
    subprocess.run([sys.executable, *install, str(archive)], check=True)
    [page] = distributions(name="graftvit", path=[str(tmp_path)])
    assert not re.search(r"\]\((?!https?:)", page.read_text("METADATA") or ""), (
        "a link that an index does not have"
    )
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    place, *found = run.stdout.splitlines()
    assert Path(place) == tmp_path / "graftvit" / "__init__.py"
    files = [path.relative_to(ROOT) for path in PACKAGE_FILES if path.parent != ROOT / "launch" / "graftvit"]
    modules = {
        ".".join(["graftvit", *path.with_suffix("").parts]).removesuffix(".__init__") for path in files
    }
    assert set(found) == {*modules, "graftvit.cfgs"}
    others = [path for name in (*ORDER, "cfgs") for path in (ROOT / name).rglob("*.*")]
    templates = [
        path.relative_to(ROOT) for path in others if path.suffix not in (".py", ".pyi", ".pyc", ".typed")
    ]
    assert [str(path) for path in templates if not (tmp_path / "graftvit" / path).is_file()] == []


def is_supported(python: str) -> bool:
    return f"Programming Language :: Python :: {python}" in metadata("graftvit").get_all("Classifier")


def test_the_environment_of_conda_is_that_of_the_project() -> None:
    channel, dependencies = (
        yaml.safe_load((ROOT / "environment.yml").read_text())[key] for key in ("channels", "dependencies")
    )
    python, *rest = dependencies
    assert (channel, rest) == (["conda-forge"], ["pip", {"pip": ["."]}]), (
        "pyproject.toml alone names packages"
    )
    assert is_supported(python.removeprefix("python="))


CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "lazy_loader": "lazy-loader"}
"""Packages with another name on conda-forge."""


def test_the_recipe_of_conda_needs_what_the_project_needs() -> None:
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    project = metadata("graftvit")
    needed = [line for line in project.get_all("Requires-Dist") if ";" not in line]
    named = [re.split("(?=[<>=])", line, maxsplit=1) for line in needed]
    python = project["Requires-Python"].removeprefix(">=")
    assert recipe["context"] == {"version": project["Version"], "python_min": python}
    assert recipe["requirements"]["run"] == [
        "python >=${{ python_min }}",
        *(f"{CONDA_NAMES.get(name, name)} {bound}" for name, bound in named),
    ]
    assert f'"{recipe["requirements"]["host"][-1].replace(" ", "")}"' in (ROOT / "pyproject.toml").read_text()
    assert recipe["about"]["license"] == project["License-Expression"]
    assert recipe["about"]["license_file"] == project.get_all("License-File")
    [command] = entry_points(group="console_scripts", name="graftvit")
    assert recipe["build"]["python"]["entry_points"] == [f"graftvit = {command.value}"]


@pytest.mark.parametrize(
    "target", ["demo", "compare", "test-all", "acceptance", "real", "lint", "docs", "bench", "dist", "dev"]
)
def test_each_make_target_sets_itself_up(target: str, tmp_path: Path) -> None:
    command = [
        "make",
        "--dry-run",
        "--always-make",
        "--directory",
        str(ROOT),
        target,
        f"VENV={tmp_path / 'venv'}",
        f"PYTHON={sys.executable}",  # else make starts each Python of this machine
    ]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"-m venv {tmp_path / 'venv'}" in steps
    assert ("--no-deps" in steps) == (target != "lint")
    assert "--editable" not in steps, "the tests must see what a user gets"
    assert ("pytest -n" in steps) == (target in ("test-all", "acceptance"))


def test_after_make_dev_the_tests_see_the_sources(tmp_path: Path) -> None:
    (tmp_path / ".editable").touch()
    command = ["make", "--dry-run", "--directory", str(ROOT), "test", f"VENV={tmp_path}", "PYTHON=python"]
    steps = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "editable_mode=strict --editable ." in steps


@pytest.mark.parametrize(("python", "words"), [("/bin/false", "PYTHON=/bin/false"), ("", "no Python 3.10")])
def test_make_without_a_usable_python_says_so(python: str, words: str, tmp_path: Path) -> None:
    command = ["make", "--directory", str(ROOT), "test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert words in result.stderr


def test_ci_is_a_script_that_runs_all_of_them() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "\nmake test-all\nmake acceptance\nmake lint\n" in text


def test_the_workflow_runs_that_script_and_may_only_read() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    [job] = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read"}
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    [python] = [step["with"] for step in job["steps"] if "python-version" in step.get("with", {})]
    assert is_supported(python["python-version"])
    assert (ROOT / python["cache-dependency-path"]).is_file()


@pytest.mark.parametrize(
    ("file", "copied", "base", "starts"),
    [
        ("Dockerfile", r"^COPY (\S+) (\S+)$", r"^FROM python:(.*)$", r'^ENTRYPOINT \["(.*)"\]$'),
        ("apptainer.def", r"^ +(dist\S+) (\S+)$", r"^From: python:(.*)$", r'^ +exec (.*) "\$@"$'),
    ],
)
def test_a_container_installs_the_wheel_of_make_dist(file: str, copied: str, base: str, starts: str) -> None:
    text = (ROOT / file).read_text()
    [(wheel, folder)] = re.findall(copied, text, re.MULTILINE)
    assert f"pip install --quiet {wheel}\n" in (ROOT / "Makefile").read_text()
    assert f"pip install --no-cache-dir {folder}{Path(wheel).name}\n" in text
    assert f"!{wheel}\n" in (ROOT / ".dockerignore").read_text()
    [python], [command] = (re.findall(pattern, text, re.MULTILINE) for pattern in (base, starts))
    assert is_supported(python)
    assert entry_points(group="console_scripts", name=command)


def test_make_test_leaves_out_the_acceptance_suite_alone(request: pytest.FixtureRequest) -> None:
    named = [path for pattern in request.config.getini("testpaths") for path in ROOT.glob(pattern)]
    tests = set((ROOT / "tests").rglob("test_*.py"))
    left_out = {path for path in tests if not any(path.is_relative_to(each) for each in named)}
    assert {path.parent for path in left_out} == {ROOT / "tests" / "acceptance"}


@functools.cache
def attributes_read() -> set[str]:
    """Names that the packages read as an attribute."""
    names: set[str] = set()
    for path in PACKAGE_FILES:
        if path.name == "config.py" and path.parent.name == "transfer":
            continue
        for node in ast.walk(parsed(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_no_setting_changes_nothing() -> None:
    autoencoder = (ROOT / "models" / "mae.py").read_text()
    for key, leaf in leaves().items():
        if key == "imports":
            continue  # read before there is a run: tests/models/test_plugins.py
        if leaf.section == "pretrain":
            # handed to the autoencoder as keywords of the same names
            assert re.search(rf"\b{leaf.name}:", autoencoder), key
        else:
            assert leaf.name in attributes_read(), f"{key} is read nowhere"


@pytest.mark.parametrize("name", [*PAGES, pytest.param("models.md", marks=pytest.mark.slow)])
def test_the_tables_of_a_page_are_what_the_code_says(name: str) -> None:
    assert MARKED.findall((DOCS / name).read_text()) == [{**PAGES, **SLOW_PAGES}[name]()], "run `make docs`"
    assert all(find_key(key) == key and f"| `{key}` |" in render_settings() for key in leaves())


def test_documents_name_no_setting_that_is_gone() -> None:
    dotted = re.compile(rf"(?<![\w./-])(?:--)?((?:{'|'.join(sections())})\.[a-z_]+)(?=[=`\s])")
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for key in dotted.findall(path.read_text()):
            assert find_key(key) or find_stage_key(key) or key.endswith((".py", ".json")), (
                f"{name_of(path)}: {key}"
            )


OTHER_NAMES = {
    "checkpoints/formats/containers.py": {"copy"},  # a mode of the official code, in its checkpoints
    "transfer/analysis/demo.py": {"copy", "scratch"},  # rows of the demo
    "transfer/engine/runlog.py": {"transfer"},  # a loss
}
"""By file: such names that are those of something else there."""


def test_names_of_modes_and_methods_are_compared_in_their_registries_alone() -> None:
    names = {*MODES, *method_names(), "copy_"}
    found = {}
    for path in PACKAGE_FILES:
        compared_here: set[str] = set()
        for node in ast.walk(parsed(path.read_text())):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            prefixes = node.args if isinstance(node, ast.Call) and _is_prefix_test(node) else []
            compared_here |= {
                leaf.value for part in (*compared, *prefixes) for leaf in ast.walk(part) if _is_text(leaf)
            }  # type: ignore[attr-defined]
        if compared_here & names:
            found[name_of(path)] = compared_here & names
    assert found == OTHER_NAMES


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_prefix_test(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in (
        "startswith",
        "endswith",
        "removeprefix",
    )


def test_the_help_of_settings_describes_each() -> None:
    for kind in [RunConfig, *sections().values()]:
        for name, field in kind.model_fields.items():
            assert f"\n    {name}: " in (kind.__doc__ or "")
            assert (field.description or "") in (kind.__doc__ or "")
        assert len(str(inspect.signature(kind))) < 1500
