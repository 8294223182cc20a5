"""Copy the code that a job runs at submission, so that later edits do not change it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import write_folder

PARTS = ("models", "checkpoints", "transfer", "launch", "cfgs")


def copy_package(folder: Path) -> Path:
    """Copy the installed package to `folder/code-<digest>`, and return that; the same code is copied once.

    In front of the module search path it takes the place of what is installed, its version included.
    """
    files = _files()
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0".encode() + path.read_bytes())
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        size = sum(path.stat().st_size for path in files.values())
        write_folder(target, lambda new: _copy(files, new), size=size)
    return target


def origin() -> dict[str, Any]:
    """Git revision of the code, where it lies in a repository, and the versions of the packages that it needs."""
    names = sorted({_name(line) for line in requires("graftvit") or () if "extra ==" not in line})
    return {
        "graftvit": version("graftvit"),
        **_revision(),
        "packages": {name: _version(name) for name in names},
    }


def _files() -> dict[str, Path]:
    """Place under the module search path -> file. The package's parts may lie apart, as in an editable install."""
    roots = {f"graftvit/{name}": _folder(f"graftvit.{name}") for name in PARTS}
    found = {f"graftvit/{path.name}": path for path in _folder("graftvit").glob("*.py*") if path.is_file()}
    for place, root in roots.items():
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{place}/{path.relative_to(root)}"] = path
    return dict(sorted(found.items()))


def _folder(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _copy(files: dict[str, Path], folder: Path) -> None:
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    metadata = folder / f"graftvit-{version('graftvit')}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    installed = distribution("graftvit")  # PKG-INFO where it is found through the egg-info of a checkout
    text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    metadata.write_text(text, encoding="utf-8")


def _revision() -> dict[str, Any]:
    """Return the commit, and whether the package's own files differ from it; empty if it is not in a repository."""
    here = _folder("graftvit.launch")
    parts = [str(_folder(f"graftvit.{name}")) for name in PARTS]
    try:
        _git(here, "ls-files", "--error-unmatch", "cli.py")  # not a repository that the package only lies in
        return {
            "git": _git(here, "rev-parse", "HEAD"),
            "edited": bool(_git(here, "status", "--porcelain", "--", *parts)),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _name(requirement: str) -> str:
    end = next(
        (i for i, sign in enumerate(requirement) if not (sign.isalnum() or sign in "-_.")), len(requirement)
    )
    return requirement[:end]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
