"""Make the batch script of a job, with its resources as submitit and sbatch take them. Write and submit nothing."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import submitit

from ...checkpoints.atomic import write_folder
from ...models.errors import ConfigError
from .settings import ClusterConfig, check_line

LOG_START = "GRAFTVIT_LOG_START"
"""The variable with the bytes that earlier attempts have written into the error log of the script and of rank 0.

The script counts them: srun tells there of a rank that fails at once, while the first rank still starts.
"""


@dataclass(frozen=True)
class Request:
    """One run to submit: the words after `graftvit`, and the folder that it writes."""

    words: list[str]
    output_dir: Path


def new_identity() -> str:
    """Return a name for a launch that no other launch of its folder has."""
    return uuid.uuid4().hex[:8]


@dataclass(frozen=True)
class Launch:
    """Runs that go to the cluster together, as one job or as one array, and what they ask of it."""

    name: str
    folder: Path
    """Its `jobs/` has the logs, the copy of the code and what submitit writes."""
    requests: Sequence[Request]
    config: ClusterConfig
    cpus_per_task: int
    after: str | None = None
    """The job that has to finish first; if it fails, these jobs are cancelled."""
    identity: str = field(default_factory=new_identity)

    def __post_init__(self) -> None:
        """Check the names of folders.

        Raises ConfigError: one that the script or the list of runs names would end its line.
        """
        for what, folder in (
            ("--output_dir", str(self.folder)),
            ("the folder that you submit from,", str(Path.cwd())),
        ):
            try:
                check_line(folder)
            except ValueError as error:
                raise ConfigError(f"{what} {folder!r} cannot be given to the cluster: {error}") from error

    @property
    def logs(self) -> Path:
        return self.folder / "jobs" / "logs"

    @property
    def place(self) -> Path:
        """The folder in which the job finds what it runs, and in which its number is recorded."""
        return self.folder / "jobs" / f"launch-{self.identity}"

    @property
    def start(self) -> Path:
        """The script that starts the interpreter of each task."""
        return self.place / "start.sh"


def job_name(folder: Path) -> str:
    """Return the job name of a submission to `folder`; it distinguishes runs of the same name in different places."""
    place = folder.resolve()  # whichever link leads to it
    word = re.sub(r"[^\w.,=+-]", "-", place.name)
    return f"graftvit-{word}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def executor_of(launch: Launch) -> submitit.AutoExecutor:
    """Return the executor with its resources; write nothing."""
    config = launch.config
    executor = submitit.AutoExecutor(folder=launch.logs, cluster=config.cluster)
    executor.update_parameters(**_common(launch))
    if config.cluster == "slurm":
        executor.update_parameters(**_of_slurm(launch))
    elif config.cluster == "local" and (config.setup or config.node_setup):
        executor.update_parameters(local_setup=[*config.setup, *config.node_setup])
    return executor


def script(launch: Launch) -> str:
    """Return the sbatch script as it would be submitted; write nothing."""
    executor: Any = executor_of(launch)._executor
    count = len(launch.requests)
    if count > 1:
        executor.parameters["map_count"] = count  # as submitit does for an array
    return str(executor._make_submission_file_text(command(launch), "%j"))


def command(launch: Launch) -> str:
    """Return the command of each task: it reads the request from the folder of the launch."""
    return f"sh {shlex.quote(str(launch.start))} -u -m submitit.core._submit {shlex.quote(str(launch.place))}"


def _common(launch: Launch) -> dict[str, Any]:
    """Return the resources by the names that submitit has for every cluster."""
    config = launch.config
    common: dict[str, Any] = {
        "name": launch.name,
        "timeout_min": config.minutes,
        "nodes": config.nodes,
        "tasks_per_node": config.tasks,
    }
    if config.gpu_count and config.cluster != "slurm":
        common["gpus_per_node"] = config.gpu_count
    return common


def _of_slurm(launch: Launch) -> dict[str, Any]:
    config = launch.config
    more: dict[str, Any] = {"requeue": True, "chdir": os.getcwd(), **config.options()}  # noqa: PTH109
    steps = [
        f"--cpus-per-task={launch.cpus_per_task}",
        "--kill-on-bad-exit=1",
    ]  # srun >= 22.05 inherits no cores
    if config.container:
        steps.append(f"--container-image={config.container}")
    if config.container_mounts:
        steps.append(f"--container-mounts={config.container_mounts}")
    if launch.after is not None:
        more["dependency"] = f"afterok:{launch.after}"
        more["kill_on_invalid_dep"] = "yes"
    return {
        "cpus_per_task": launch.cpus_per_task,
        "slurm_signal_delay_s": config.signal_delay,
        "slurm_array_parallelism": config.array_parallelism,
        "slurm_setup": [
            f"export {LOG_START}=$(stat -L -c %s /dev/fd/2)",
            *config.setup,
            *_node_setup(launch),
        ],
        "slurm_teardown": _after_the_end(launch),
        "slurm_srun_args": steps,
        "slurm_additional_parameters": more,
    }


def _node_setup(launch: Launch) -> list[str]:
    """Return a step of one task a node, which has all cores of the job there.

    Signals wait for its end: a preempted job whose step dies of SIGTERM has failed, and is not started again.
    """
    config = launch.config
    if not config.node_setup:
        return []
    lines = "\n".join(["trap '' TERM USR2", *config.node_setup])
    step = [
        f"--nodes={config.nodes}",
        f"--ntasks={config.nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    cores = f"--cpus-per-task={launch.cpus_per_task * config.tasks}"
    return [shlex.join(["srun", *step, cores, "bash", "-e", "-c", lines]) + " || exit $?"]


def _after_the_end(launch: Launch) -> list[str]:
    """Return lines after srun: an error may be one after which the job is started again (`restart`).

    A file system that is away takes the folder along, and often comes back. Where its neighbors are there, or it is
    itself and our part of it is not, somebody has removed or moved that.
    """
    paths = (launch.folder, launch.folder.parent, launch.start, launch.place)
    folder, above, start, place = (shlex.quote(str(path)) for path in paths)
    return [
        "code=$?",
        '[ "$code" -eq 0 ] && exit 0',
        f"for _ in $(seq 30); do [ -d {folder} ] && break; "
        f'[ -n "$(ls -A {above} 2>/dev/null)" ] && exit "$code"; sleep 10; done',
        f'[ -r {start} ] || exit "$code"',
        f'exec sh {start} -m graftvit.launch.slurm.restart {place} "$code"',
    ]


# Copy the code that a job runs at submission, so that later edits do not change it.

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
