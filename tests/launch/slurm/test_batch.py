"""The script of a job, and the copy of the code that it runs: whole, made once, and out of reach of later edits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.slurm import batch as module
from graftvit.launch.slurm.attempt import Task
from graftvit.launch.slurm.batch import Batch, copy_package, origin, script
from graftvit.launch.slurm.request import Request
from graftvit.models.errors import ConfigError
from support.runs.patience import until
from support.slurm.cluster_runs import ALONE, cluster_run, user_environment
from support.slurm.cluster_users import write_program
from support.slurm.slurm_cluster import SlurmCluster


def test_what_waits_for_a_teacher_is_cancelled_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path, "srun", "")  # submitit looks for it
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    tasks = [Task(["train"], tmp_path / name) for name in ("a", "b")]
    after, alone = (
        script(Batch(tmp_path, tasks, Request(dependency="afterany:1"), 1, after=job)) for job in ("7", None)
    )
    assert "#SBATCH --dependency=afterok:7\n" in after
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in after
    assert "#SBATCH --dependency=afterany:1\n" in alone
    assert "kill-on-invalid-dep" not in alone


def test_a_folder_that_would_end_its_line_is_refused_and_its_name_tells_it_from_others(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="cannot be given to the cluster: it must be one line"):
        Batch(tmp_path / "a\nb", [], Request(), 1)
    (tmp_path / "link").symlink_to(tmp_path)
    one, same, other = (
        Batch(tmp_path / name / "my|run", [], Request(), 1) for name in (".", "link", "other")
    )
    assert one.name == same.name != other.name
    assert one.name.startswith("graftvit-my-run-")
    assert one.place != same.place


HIDE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path[:] = [path for path in sys.path if "__editable__" not in path]
"""
"""For an interpreter that must not find the installed package."""
USE = """
import graftvit, json, pathlib
import graftvit.checkpoints.state, graftvit.models.errors, graftvit.transfer.config
from graftvit.launch.load_config import recipe_names
from graftvit.launch.cli import _version
modules = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "graftvit"]
print(json.dumps([graftvit.__version__, _version(), list(recipe_names()), [str(path) for path in modules if path]]))
"""


def python(folder: Path, code: str, cwd: Path) -> Any:
    """What `code` prints as JSON in an interpreter with `folder` in front of its path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in a repository, with a part in a folder of its own each, taken for the installed one."""
    root = tmp_path / "checkout"
    places = {"graftvit": root / "launch" / "root"}
    places |= {f"graftvit.{name}": root / name for name in module.PARTS}
    for folder in places.values():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("")
    (root / "launch" / "cli.py").write_text("x = 1\n")
    (root / "notes.md").write_text("")
    (root / ".gitignore").write_text("__pycache__\n")
    monkeypatch.setattr(module, "_folder", lambda module: places[module])
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    return root


def git(folder: Path, *words: str) -> str:
    known = ["-c", "user.name=me", "-c", "user.email=me@x", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *known, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_the_copy_is_whole(tmp_path: Path) -> None:
    code = copy_package(tmp_path / "jobs")
    assert code.parent == tmp_path / "jobs"
    found, command, recipes, modules = python(code, HIDE + USE, tmp_path)
    assert found == command == version("graftvit")
    assert "attention_distill_vit_large" in recipes
    assert len(modules) > 5
    beside_the_installed = python(code, "import sys\n" + USE, tmp_path)[3]  # which the copy hides
    assert all(Path(module).is_relative_to(code) for module in [*modules, *beside_the_installed])
    for part in module.PARTS:
        assert names(code / "graftvit" / part) == names(module._folder(f"graftvit.{part}"))


def names(folder: Path) -> set[str]:
    """The files of a package, without those that python makes of them."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in found}


@pytest.mark.slow
def test_a_copy_can_be_copied(tmp_path: Path) -> None:
    """As a job does that submits another one, or a package that was installed and not linked."""
    code = copy_package(tmp_path / "one")
    again = "from graftvit.launch.slurm.batch import copy_package, origin\n"
    again += "from pathlib import Path\nprint(json.dumps([str(copy_package(Path('two'))), origin()]))"
    second, made = python(code, f"{HIDE}import json\n{again}", tmp_path)
    assert Path(second).name == code.name
    assert names(tmp_path / second) == names(code)
    assert "git" not in made
    assert made["graftvit"] == version("graftvit")
    third = tmp_path / "site-packages"
    shutil.copytree(code, third)
    assert python(tmp_path / second, HIDE + USE, tmp_path)[:3] == python(third, HIDE + USE, tmp_path)[:3]


@pytest.mark.slow
def test_a_checkout_found_by_its_egg_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `python -m graftvit.launch` typed in the folder of the sources: there is no METADATA there."""
    egg = tmp_path / "here" / "graftvit.egg-info"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: graftvit\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(egg.parent))
    assert version("graftvit") == "9.9"
    code = copy_package(tmp_path / "jobs")
    monkeypatch.undo()
    assert python(code, HIDE + USE, tmp_path)[0] == "9.9"


def test_the_same_code_is_copied_once(checkout: Path, tmp_path: Path) -> None:
    first = copy_package(tmp_path / "jobs")
    stamp = (first / "graftvit" / "launch" / "cli.py").stat().st_ino
    (compiled,) = (first / "graftvit" / "launch" / "__pycache__").glob("cli.*.pyc")
    assert compiled.read_bytes()[4:8] == b"\1\0\0\0", "checked against a hash, never"
    assert str(first / "graftvit" / "launch" / "cli.py").encode() in compiled.read_bytes()
    (checkout / "launch" / "__pycache__").mkdir()
    (checkout / "launch" / "__pycache__" / "cli.pyc").write_text("")
    assert copy_package(tmp_path / "jobs") == first
    assert (first / "graftvit" / "launch" / "cli.py").stat().st_ino == stamp


@pytest.mark.parametrize("edit", ["content", "new file", "renamed", "removed", "recipe"])
def test_an_edit_makes_another_copy(checkout: Path, tmp_path: Path, edit: str) -> None:
    extra = checkout / "models" / "extra.py"
    extra.write_text("y = 1\n")
    first = copy_package(tmp_path)
    edits: dict[str, Callable[[], object]] = {
        "content": lambda: (checkout / "launch" / "cli.py").write_text("x = 2\n"),
        "new file": (checkout / "models" / "new.py").touch,
        "renamed": lambda: extra.rename(checkout / "models" / "other.py"),
        "removed": extra.unlink,
        "recipe": lambda: (checkout / "cfgs" / "mine.yaml").write_text("seed: 1\n"),
    }
    edits[edit]()
    second = copy_package(tmp_path)
    assert second != first
    assert (first / "graftvit" / "launch" / "cli.py").read_text() == "x = 1\n"
    assert (first / "graftvit" / "models" / "extra.py").exists()
    assert (second / "graftvit" / "models" / "extra.py").exists() == extra.exists()


def test_the_revision(checkout: Path) -> None:
    assert "git" not in origin()
    git(checkout, "init")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "one")
    head = git(checkout, "rev-parse", "HEAD")
    assert (origin()["git"], origin()["edited"]) == (head, False)
    (checkout / "notes.md").write_text("what the job does not run")
    (checkout / "run.log").write_text("")
    assert origin()["edited"] is False
    (checkout / "models" / "new.py").write_text("")
    assert origin()["edited"] is True  # a new file is in the copy and not in the commit
    (checkout / "models" / "new.py").unlink()
    (checkout / "launch" / "cli.py").write_text("x = 2\n")
    assert (origin()["git"], origin()["edited"]) == (head, True)


def test_a_repository_that_the_package_only_lies_in(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(checkout, "init")
    (checkout / ".gitignore").write_text("*\n")
    git(checkout, "add", "-f", "notes.md")
    git(checkout, "commit", "-m", "mine")
    assert "git" not in origin()
    monkeypatch.setenv("PATH", "/nowhere")  # nor where there is no git
    assert "git" not in origin()


def test_versions_of_what_it_needs() -> None:
    packages = origin()["packages"]
    assert packages["torch"] == version("torch")
    assert packages["submitit"] == version("submitit")
    assert {"timm", "safetensors", "accelerate"} <= set(packages)
    assert not {"pytest", "mypy", "ruff"} & set(packages)  # of extras
    assert all(packages.values())
    json.dumps(origin())


TOLD = 'import pathlib, os\npathlib.Path(os.environ["TOLD"]).open("a").write("{}\\n")\n'


@pytest.mark.slurm
@pytest.mark.slow
def test_a_requeued_run_takes_no_edit_made_since(tmp_path: Path, cluster: SlurmCluster) -> None:
    """The package of the user's PYTHONPATH is edited while the run goes on; both attempts run what was submitted."""
    sources, told = tmp_path / "sources", tmp_path / "told"
    shutil.copytree(copy_package(tmp_path / "jobs"), sources)
    train = sources / "graftvit" / "launch" / "commands" / "train.py"
    original = train.read_text()

    def edit(word: str) -> None:
        train.write_text(original.replace("import signal\n", "import signal\n" + TOLD.format(word), 1))

    edit("submitted")
    run = cluster_run(cluster, tmp_path, optim={"epochs": 6})
    words = [sys.executable, "-m", "graftvit.launch", "submit", run.recipe(), *ALONE]
    own = {"PYTHONPATH": str(sources), "TOLD": str(told)}
    environment = {**user_environment(cluster, tmp_path), **own}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    edit("edited")
    run.wait_for_lines(3)
    cluster.run("scontrol", "requeue", done.stdout.split()[2])
    run.wait_for_attempt(2)
    attempts = run.finish()
    assert attempts[-1].outcome == "finished"
    assert told.read_text().split() == ["submitted"] * len(attempts)
    submission = run.jobs.job()
    assert submission is not None
    assert submission.origin["packages"]["torch"] == version("torch")
    assert Path(submission.code).name in (Path(submission.launch) / "start.sh").read_text()
    until(lambda: not cluster.run("squeue", "-h").strip(), "an empty queue", every=0.5)
