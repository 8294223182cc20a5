"""Rooms that are easy to find: no circle of imports, own names of files, and timm's models in one place."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "checkpoints", "transfer", "launch")


def python_files(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*.py"))


def imported_files(root: Path, path: Path) -> set[Path]:
    """Return the files of the project that a file imports: at once, within a function, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse((root / path).read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for name in [alias.name for alias in node.names]:
            nearest = (folder / f"{name}.py", folder.with_suffix(".py"), folder / "__init__.py")
            found |= {next(file for file in nearest if (root / file).is_file())}
    return found


def import_graph(root: Path) -> dict[Path, set[Path]]:
    return {path: imported_files(root, path) for path in python_files(root)}


def room(path: Path) -> Path:
    """Return the package of a file: two levels of folders at most."""
    return Path(*path.parent.parts[:2])


def room_graph(files: dict[Path, set[Path]]) -> dict[Path, set[Path]]:
    """Return which packages a package imports, without its own parent and children."""
    graph: dict[Path, set[Path]] = defaultdict(set)
    for path, imported in files.items():
        here = room(path)
        graph[here] |= {
            there
            for there in map(room, imported)
            if here not in (there, there.parent) and there != here.parent
        }
    return graph


def test_no_file_and_no_package_imports_itself_through_another() -> None:
    files = import_graph(ROOT)
    TopologicalSorter(files).prepare()
    TopologicalSorter(room_graph(files)).prepare()


def test_the_check_of_circles_would_notice(tmp_path: Path) -> None:
    texts = {
        "transfer/data/a.py": "from ..engine import b",
        "transfer/engine/b.py": "from .c import x",
        "transfer/engine/c.py": "from ..data.d import x",
        "transfer/data/d.py": "x = 1",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    files = import_graph(tmp_path)
    TopologicalSorter(files).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(room_graph(files)).prepare()
    (tmp_path / "transfer/data/d.py").write_text("def f():\n    from .a import x")
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(tmp_path)).prepare()


def test_each_file_has_a_name_of_its_own() -> None:
    """A file of launch/commands alone may be called as what it is the command of."""
    places = defaultdict(list)
    for path in python_files(ROOT):
        if path.name != "__init__.py" and path.parent != Path("launch/commands"):
            places[path.name].append(str(path))
    assert [paths for paths in places.values() if len(paths) > 1] == []


# Nobody but the families knows a class of timm's models, or asks what kind of model there is.


def classes_of_timm(root: Path, path: Path) -> list[str]:
    """Return the classes of timm's models that a file imports, and each question whether a model is a pyramid."""
    found = []
    for node in ast.walk(ast.parse((root / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            is_model = node.module.startswith("timm.models.") and not node.module.startswith("timm.models._")
            found += [alias.name for alias in node.names if is_model]
        elif isinstance(node, ast.Attribute) and node.attr == "is_pyramid":
            found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id == "is_pyramid":
            found.append(node.id)
    return found


def test_only_families_know_timms_models() -> None:
    others = [path for path in python_files(ROOT) if path.parent != Path("models/families")]
    assert {str(path): found for path in others if (found := classes_of_timm(ROOT, path))} == {}


def test_the_check_of_timms_models_would_notice(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from timm.models.beit import Beit\nfrom timm.models import register_model\n"
    )
    (tmp_path / "b.py").write_text("if family.is_pyramid or is_pyramid(model):\n    pass\n")
    assert classes_of_timm(tmp_path, Path("a.py")) == ["Beit"]
    assert len(classes_of_timm(tmp_path, Path("b.py"))) == 2
