"""Make the batch script of a job, with its resources as submitit and sbatch take them. Write and submit nothing."""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import os
import py_compile
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import submitit

from ...checkpoints.atomic import write_file, write_folder, write_text
from ...models.errors import ConfigError
from ...transfer.config import RunConfig
from ..say import say_aside
from ..sweep import Sweep
from .attempt import Task
from .environment import LOG_START, detached
from .request import Request, check_line


@dataclass(frozen=True)
class Batch:
    """What goes to the cluster together, as one job or as one array, and what it asks of it."""

    folder: Path
    """Its `jobs/` has the logs, the copy of the code and what submitit writes."""
    tasks: Sequence[Task]
    """Without the cells of a sweep that have finished with these very settings."""
    request: Request
    cores: int
    """Cores of a process."""
    frozen: Mapping[Path, str] = field(default_factory=dict)
    """Files to write before it is submitted."""
    first: Task | None = None
    """What the others have to wait for: the teacher of a comparison."""
    configs: Sequence[RunConfig] = ()
    """The run to check and describe: the first stage of the first cell, or the teacher to train."""
    sweep: Sweep | None = None
    comparison: bool = False
    again: bool = False
    """Whether it was submitted before, with these very settings."""
    after: str | None = None
    """The job that has to finish first; if it fails, these jobs are cancelled."""
    identity: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Distinguishes its launch from others of the folder."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a folder whose name would end its line of the script, or of the list of runs."""
        for what, folder in (("--output_dir", self.folder), ("the folder that you submit from,", Path.cwd())):
            try:
                check_line(str(folder))
            except ValueError as error:
                raise ConfigError(
                    f"{what} {str(folder)!r} cannot be given to the cluster: {error}"
                ) from error

    @property
    def name(self) -> str:
        """The name of the job; it distinguishes runs of the same name in different places."""
        place = self.folder.resolve()  # whichever link leads to it
        word = re.sub(r"[^\w.,=+-]", "-", place.name)
        return f"graftvit-{word}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1

    @property
    def runs(self) -> list[Path]:
        """The folders of all tasks, that which the others wait for first."""
        return [one.output_dir for one in ([self.first] if self.first else []) + list(self.tasks)]

    @property
    def logs(self) -> Path:
        """The folder of the logs."""
        return self.folder / "jobs" / "logs"

    @property
    def place(self) -> Path:
        """The folder in which the job finds what it runs, and in which its number is recorded."""
        return self.folder / "jobs" / f"launch-{self.identity}"

    def write(self) -> None:
        """Freeze the configurations in the run folders. Raises WriteFailedError."""
        for path, text in self.frozen.items():
            write_text(path, text)
        if self.sweep is not None:
            self.sweep.save()


def executor_of(batch: Batch) -> submitit.AutoExecutor:
    """Return the executor with its resources; write nothing."""
    request = batch.request
    executor = submitit.AutoExecutor(folder=batch.logs, cluster=request.cluster)
    executor.update_parameters(
        name=batch.name, timeout_min=request.minutes, nodes=request.nodes, tasks_per_node=request.tasks
    )
    if request.cluster == "slurm":
        executor.update_parameters(**_of_slurm(batch))
    elif request.gpu_count:
        executor.update_parameters(gpus_per_node=request.gpu_count)
    if request.cluster == "local" and (request.setup or request.node_setup):
        executor.update_parameters(local_setup=[*request.setup, *request.node_setup])
    return executor


def script(batch: Batch) -> str:
    """Return the sbatch script as it would be submitted; write nothing."""
    executor: Any = executor_of(batch)._executor
    if batch.is_array:
        executor.parameters["map_count"] = len(batch.tasks)  # as submitit does for an array
    return str(executor._make_submission_file_text(command(batch), "%j"))


def start(batch: Batch) -> str:
    """Start the job on this machine, and return its number."""
    executor: Any = executor_of(batch)._executor
    with detached(batch.logs / "controller.log"):
        return str(executor._submit_command(command(batch)).job_id)


def command(batch: Batch) -> str:
    """Return the command of each task: it reads the request from the folder of the batch."""
    start_script, place = (shlex.quote(str(path)) for path in (batch.place / "start.sh", batch.place))
    words = f"sh {start_script} -u -m submitit.core._submit {place}"
    request = batch.request
    if request.container is None or not request.container.endswith(".sif") or request.cluster != "slurm":
        return words
    devices = ["--nv"] if request.gpu_count else []
    mounts = ["--bind", request.container_mounts] if request.container_mounts else []
    return f"{shlex.join(['apptainer', 'exec', *devices, *mounts, request.container])} {words}"


def _of_slurm(batch: Batch) -> dict[str, Any]:
    request = batch.request
    more: dict[str, Any] = {"requeue": True, "chdir": os.getcwd(), **request.options()}  # noqa: PTH109
    steps = [f"--cpus-per-task={batch.cores}", "--kill-on-bad-exit=1"]  # srun >= 22.05 inherits no cores
    if request.container and not request.container.endswith(".sif"):
        steps.append(f"--container-image={request.container}")
        steps += [f"--container-mounts={request.container_mounts}"] if request.container_mounts else []
    if batch.after is not None:
        more |= {"dependency": f"afterok:{batch.after}", "kill_on_invalid_dep": "yes"}
    log_start = f"export {LOG_START}=$(stat -L -c %s /dev/fd/2)"
    return {
        "cpus_per_task": batch.cores,
        "slurm_signal_delay_s": request.signal_delay,
        "slurm_array_parallelism": request.array_parallelism,
        "slurm_setup": [log_start, *request.setup, *_node_setup(batch)],
        "slurm_teardown": _after_the_end(batch),
        "slurm_srun_args": steps,
        "slurm_additional_parameters": more,
    }


def _node_setup(batch: Batch) -> list[str]:
    """Return a step of one task a node, which has all cores of the job there.

    Signals wait for its end: a preempted job whose step dies of SIGTERM has failed, and is not started again.
    """
    request = batch.request
    unpack = [f"sh {shlex.quote(str(batch.place / 'unpack.sh'))}"] if request.pack != "no" else []
    if not request.node_setup and not unpack:
        return []
    lines = "\n".join(["trap '' TERM USR2", *unpack, *request.node_setup])
    step = f"srun --nodes={request.nodes} --ntasks={request.nodes} --ntasks-per-node=1 --kill-on-bad-exit=1"
    cores = f"--cpus-per-task={batch.cores * request.tasks}"
    return [f"{step} {cores} bash -e -c {shlex.quote(lines)} || exit $?"]


def _after_the_end(batch: Batch) -> list[str]:
    """Return lines after srun: an error may be one after which the job is started again (`restart`).

    A file system that is away takes the folder along, and often comes back. Where its neighbors are there, or it is
    itself and our part of it is not, somebody has removed or moved that.
    """
    paths = (batch.folder, batch.folder.parent, batch.place / "start.sh", batch.place)
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
        write_folder(target, lambda new: _copy(files, new, target), size=size)
    return target


def origin() -> dict[str, Any]:
    """Git revision of the code, where it lies in a repository, and the versions of the packages that it needs."""
    packages = {}
    for line in requires("graftvit") or ():
        if "extra ==" not in line and (name := re.match(r"[\w.-]+", line)):
            with contextlib.suppress(PackageNotFoundError):
                packages[name[0]] = version(name[0])
    return {"graftvit": version("graftvit"), **_revision(), "packages": packages}


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


def _copy(files: dict[str, Path], folder: Path, target: Path) -> None:
    """Copy and compile: a file that is never checked for a newer source costs a rank nothing."""
    for name, path in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    metadata = folder / f"graftvit-{version('graftvit')}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    installed = distribution("graftvit")  # PKG-INFO where it is found through the egg-info of a checkout
    text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    metadata.write_text(text, encoding="utf-8")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(folder, quiet=2, invalidation_mode=unchecked, stripdir=folder, prependdir=target)


def _revision() -> dict[str, Any]:
    """Return the commit, and whether the package's own files differ from it; empty if it is not in a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(_folder("graftvit.launch")), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "cli.py")  # not a repository that the package only lies in
        parts = [str(_folder(f"graftvit.{name}")) for name in PARTS]
        return {"git": git("rev-parse", "HEAD"), "edited": bool(git("status", "--porcelain", "--", *parts))}
    except (OSError, subprocess.SubprocessError):
        return {}


# Pack the environment and the code into files, which one task of each node unpacks to its local disk.
#
#     env-<digest>.tar     the environment
#     base-<digest>.tar    the interpreter that it stands on, unless that is the system's
#     code-<digest>.tar    the copy of the package
#
# A pack is made once, by a digest of the names, sizes and times of its files, or by the code's name.

NODE_FOLDER = '"${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/graftvit-$(id -u)"'
"""The folder of a node that packs are unpacked to, for the shell."""
SYSTEM = ("/usr", "/usr/local")
"""Prefixes of interpreters that nodes have themselves."""
UNPACK = """\
#!/bin/sh
set -eu
parent={parent}
mkdir -p -m 700 "$parent"
[ -O "$parent" ] && [ ! -L "$parent" ] || {{ echo "graftvit: $parent is another user's" >&2; exit 1; }}
exec 9>"$parent/.lock"
if command -v flock >/dev/null; then flock 9; fi  # another job of this node may unpack the same
find "$parent" -mindepth 1 -maxdepth 1 -mtime +30 -exec rm -rf {{}} +
for pack in {packs}; do
  name=$(basename "$pack")
  place="$parent/${{name%.*}}"
  if [ ! -d "$place" ]; then
    new=$(mktemp -d "$parent/.$name.XXXXXX")
    case "$name" in
      *.squashfs) unsquashfs -quiet -no-progress -force -dest "$new" "$pack" ;;
      *) tar -xf "$pack" -C "$new" ;;
    esac
    if [ -f "$new/pyvenv.cfg" ] && [ -n "${{base:-}}" ]; then  # it stands on the interpreter that was unpacked before
      sed -i "s|^home = .*|home = $base/bin|" "$new/pyvenv.cfg"
      ln -sf "$base/bin/{python}" "$new/bin/python"
    fi
    mv -T "$new" "$place" 2>/dev/null || rm -rf "$new"
  fi
  touch "$place"
  case "$name" in base-*) base="$place" ;; esac
done
"""


def make_packs(code: Path, folder: Path, kind: str) -> list[Path]:
    """Return the packs of the interpreter, the environment and the code in `folder`, made where they are not there.

    Raises ConfigError: the program that packs is not here, or failed; WriteFailedError: there is no room.
    """
    program = "mksquashfs" if kind == "squashfs" else "tar"
    if shutil.which(program) is None:
        raise ConfigError(f"--pack {kind}: there is no {program} here")
    base, env = Path(sys.base_prefix), Path(sys.prefix)
    own = base not in (env, *map(Path, SYSTEM))
    roots = {f"base-{_digest(base)}": base} if own else {}
    roots |= {f"env-{_digest(env)}": env, code.name: code}
    return [_make(name, root, folder, kind) for name, root in roots.items()]


def unpack_script(packs: Sequence[Path]) -> str:
    """Return the shell script that a task of each node runs before the processes start."""
    words = " ".join(shlex.quote(str(pack)) for pack in packs)
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return UNPACK.format(parent=NODE_FOLDER, packs=words, python=python)


def on_node(packs: Sequence[Path], name: str) -> str:
    """Return the place of a pack on a node, as a word of the shell."""
    return next(f"{NODE_FOLDER}/{pack.stem}" for pack in packs if pack.name.startswith(f"{name}-"))


def _make(name: str, root: Path, folder: Path, kind: str) -> Path:
    target = folder / f"{name}.{kind}"
    if target.exists():
        return target
    say_aside(f"graftvit: packing {root} into {target} ...\n")
    folder.mkdir(parents=True, exist_ok=True)

    def write(new: Path) -> None:
        # Level 1 takes a tenth of the time of the default, for a sixth more bytes.
        squash = ["mksquashfs", str(root), str(new), "-noappend", "-quiet", "-no-progress"]
        squash += ["-Xcompression-level", "1"]
        words = squash if kind == "squashfs" else ["tar", "-cf", str(new), "-C", str(root), "."]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigError(f"{words[0]} cannot pack {root}: {done.stderr.strip()[-300:]}")

    write_file(target, write, size=sum(path.lstat().st_size for path in root.rglob("*")))
    return target


def _digest(root: Path) -> str:
    """Return a digest of the names, sizes and times of all files below a folder, without bytecode."""
    digest = hashlib.sha256(str(root).encode())
    for path in sorted(root.rglob("*")):
        if "__pycache__" not in path.parts:
            known = path.lstat()
            line = f"{path.relative_to(root)}\0{known.st_size}\0{known.st_mtime_ns}\n"
            digest.update(line.encode(errors="replace"))
    return digest.hexdigest()[:12]
