"""Read the resources of a job from flags, a profile, the environment and the site file. The first one wins.

Each resource is a flag of `graftvit submit` and `resume`, named as in sbatch.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil
from pydantic import ValidationError

from ...checkpoints.files import is_there, nearest_folder, read_regular
from ...models.errors import ConfigError, did_you_mean
from ...models.plain_yaml import MAX_BYTES, YamlError, parse_yaml
from ..flags import Parser, run_folder
from .request import MEMORY, Request, gpus_in, option_name, sbatch_fields, without_gpus

OPTION_VARIABLES = {
    f"SBATCH_{name.upper()}": name
    for name in (
        "acctg_freq", "batch", "core_spec", "delay_boot", "distribution", "exclusive", "gpu_freq", "gres_flags", "hint",
        "mem_bind", "network", "power", "profile", "spread_job", "thread_spec", "threads_per_core", "use_min_nodes",
        "wait_all_nodes", "wckey",
    )
} | {"SBATCH_REQ_SWITCH": "switches"}  # fmt: skip
"""Other variables that sbatch reads and a run can accept."""
WITHOUT_VALUE = ("exclusive", "spread_job", "use_min_nodes")
EXCLUSIVE_FOR = tuple(("exclusive", whom) for whom in ("user", "mcs", "topo"))


@dataclass(frozen=True)
class Layer:
    """Values of one origin."""

    values: Mapping[str, Any]
    name_of: Callable[[str], str]
    """How an error and the dry run name the origin of a value."""


@dataclass
class Asked:
    """All layers in one: the value that wins, and its origin."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """The origin by key; `sbatch.hold` for an option."""

    def put(self, layer: Layer) -> None:
        """Lay the values of `layer` over what is there."""
        for name, value in layer.values.items():
            self._make_room(name, value)
        for name, value in layer.values.items():
            if name == "sbatch" and isinstance(value, Mapping):
                options = {option_name(str(key)): one for key, one in value.items()}
                below = self.values.get(name)
                self.values[name] = {**below, **options} if isinstance(below, Mapping) else options
                self.origins |= {f"{name}.{key}": layer.name_of(f"{name}.{key}") for key in options}
            else:
                self.values[name] = value
            self.origins[name] = layer.name_of(name)

    def _make_room(self, name: str, value: Any) -> None:
        """Take away what lies below and would contradict `value`."""
        if value is None:
            return
        if name in MEMORY:
            for other in MEMORY:
                self.values.pop(other, None)
        if name == "gres" and isinstance(value, str) and gpus_in(value):
            self.values.pop("gpus_per_node", None)
        if name == "gpus_per_node" and isinstance(self.values.get("gres"), str):
            self.values["gres"] = without_gpus(self.values["gres"])

    def config(self) -> Request:
        """Raise ConfigError that names the flag, the variable or the file."""
        try:
            return Request.model_validate(self.values).known_from(self.origins)
        except ValidationError as error:
            finding = error.errors()[0]
            what = finding["msg"].removeprefix("Value error, ")
            if not finding["loc"]:
                raise ConfigError(what) from error
            name = str(finding["loc"][0])
            meaning = Request.model_fields[name].description
            value = self.values[name]
            if name == "sbatch" and isinstance(value, Mapping):  # as it was typed
                value = " ".join(key if one is True else f"{key}={one}" for key, one in value.items())
            raise ConfigError(f"{self.origins[name]} is {value!r}: {what} ({meaning})") from error


def site_file() -> Path:
    """Return the user's own file of cluster settings: `$XDG_CONFIG_HOME/graftvit/cluster.yaml`."""
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "graftvit" / "cluster.yaml"


def shared_site_files() -> list[Path]:
    """Return the administrator's files for all users: `/etc/xdg/graftvit/cluster.yaml`. The first counts most."""
    roots = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    return [Path(root) / "graftvit" / "cluster.yaml" for root in roots.split(":") if root]


def ask(given: Mapping[str, Any], site: Path | None = None, before: Mapping[str, Any] | None = None) -> Asked:
    """Lay all origins over each other.

    Args:
        given: Of flags.
        site: A site file in place of the user's own and of those for all users.
        before: What the run asked for when it was submitted.

    Raises:
        ConfigError: a file or a key in it is not valid, or there is no such profile.
    """
    files = [site] if site is not None else [*reversed(shared_site_files()), site_file()]
    asked, profiles = Asked(), dict[str, Layer]()

    def chosen(name: Any, origin: str) -> Layer:
        if name not in profiles:
            raise ConfigError(
                f"{origin} {name!r} is not among the profiles of {files[-1]}: "
                + (f"valid: {', '.join(profiles)}" if profiles else "it has none")
            )
        return profiles[name]

    contents = [(path, _read_site(path, needed=site is not None)) for path in files]
    for path, content in contents:
        profiles |= _profiles(content.pop("profiles", None), path)
    usual = [path for path, content in contents if content.get("profile") is not None][-1:]
    for path, content in contents:
        asked.put(Layer(content, partial("{}: {}".format, path)))
        if path in usual and "profile" not in given:
            asked.put(chosen(content["profile"], f"{path}: profile"))
    asked.put(from_environment())
    asked.put(Layer(dict(before or {}), lambda key: f"{key} as before"))
    if "profile" in given:
        asked.put(chosen(given["profile"], "--profile"))
    asked.put(Layer(given, lambda key: f"--{key}" if "." not in key else "--sbatch"))
    return asked


def from_environment() -> Layer:
    """Return what the user's environment sets for sbatch: it is read here, and sbatch itself starts without it."""
    own = {mark.variable: name for name, mark in sbatch_fields().items() if mark.variable}
    values = {name: os.environ[variable] for variable, name in own.items() if os.environ.get(variable)}
    options: dict[str, Any] = {}
    for variable, name in OPTION_VARIABLES.items():
        value = os.environ.get(variable)
        if value is not None and name in WITHOUT_VALUE and _is_on(value):
            options[name] = True
        elif (value and name not in WITHOUT_VALUE) or (name, value) in EXCLUSIVE_FOR:
            options[name] = value
    names = {name: variable for variable, name in own.items()}
    names |= {f"sbatch.{name}": variable for variable, name in OPTION_VARIABLES.items()}
    return Layer(values | ({"sbatch": options} if options else {}), lambda key: names.get(key, key))


def left_out() -> list[str]:
    """Return variables for sbatch that are set, and would break what a run needs."""
    taken = {mark.variable for mark in sbatch_fields().values()} | set(OPTION_VARIABLES)
    return sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in taken)


def describe(asked: Asked) -> str:
    """Return the requested resources, a line each with its origin; for others the defaults of `--help` hold."""
    rows = []
    for name, value in asked.values.items():
        if name == "sbatch":
            rows += [
                (option.replace("_", "-"), one, asked.origins[f"sbatch.{option}"])
                for option, one in value.items()
            ]
        elif value not in (None, (), [], {}) and name != "shared_folders":
            rows.append((name, value, asked.origins[name]))
    width = max(18, *(len(name) for name, _, _ in rows), 0)
    lines = [f"  {name:<{width}} {_plain(value):<22} {origin}\n" for name, value, origin in rows]
    if ignored := left_out():
        lines.append(f"  left out, as it would break what a run needs: {', '.join(ignored)}\n")
    return f"asked of the cluster:\n{''.join(lines)}" if lines else ""


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _is_on(value: str) -> bool:
    return value in ("", "yes") or (value.isdecimal() and int(value) != 0)


def _profiles(content: Any, path: Path) -> dict[str, Layer]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise ConfigError(f"{path}: profiles must hold names with keys, as in 'debug: {{partition: debug}}'")
    for name, values in content.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: profiles: {name!r} is no name: write it in quotes")
        _check_keys(values, f"{path}: profiles.{name}", set(Request.model_fields) - {"profile"})
    return {
        name: Layer(values, partial("{}: profiles.{}.{}".format, path, name))
        for name, values in content.items()
    }


def _read_site(path: Path, *, needed: bool) -> dict[str, Any]:
    if not is_there(path):
        if needed:
            raise ConfigError(f"--site {path} does not exist")
        return {}
    try:
        content = parse_yaml(read_regular(path, limit=MAX_BYTES, refusal=ConfigError))
    except YamlError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, for example 'partition: gpu'")
    _check_keys(content, str(path), {*Request.model_fields, "profiles"})
    return content


def _check_keys(content: Mapping[Any, Any], where: str, valid: set[str]) -> None:
    for key in content:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), valid)}")


ONLY_IN_THE_SITE_FILE = ("shared_folders", "on_event", "event_minutes")


def add_cluster_flags(parser: Parser, *, again: bool = False) -> None:
    """Add a flag for each field of `Request`, and `--site`. With `again`, a submission before has the values."""
    usual = "By default the job asks for the same again" if again else f"Defaults come from {site_file()}"
    group = parser.add_argument_group("cluster", f"What the job asks for. {usual}.")
    for name, info in Request.model_fields.items():
        if name in ONLY_IN_THE_SITE_FILE:
            continue
        keywords: dict[str, Any] = {"metavar": name.upper()}
        if name in ("cluster", "pack"):
            keywords = {"choices": get_args(info.annotation)}
        elif name in ("setup", "node_setup"):
            keywords = {"metavar": "LINE", "action": "append"}
        elif name == "sbatch":
            keywords = {"metavar": "OPTION[=VALUE]", "action": "append"}
        default = "" if again or info.default in (None, (), {}) else f" (default: {info.default})"
        text = f"{info.description}{default}".replace("%", "%%")
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **keywords)
    group.add_argument(
        "--after",
        type=run_folder,
        action="append",
        default=[],
        metavar="RUN",
        help="start when this run or sweep has finished; if it fails or is stopped, this job is cancelled. Several "
        "are waited for together",
    )
    group.add_argument("--site", type=Path, metavar="FILE", help="another site file")
    group.add_argument(
        "--unchecked",
        action="store_true",
        help="skip the checks of folder, resources and data, which may exist on the nodes alone",
    )


def asked_by(arguments: argparse.Namespace, before: dict[str, Any] | None = None) -> Asked:
    """Return the resources of the flags, over those of `before` and of the site. Raises ConfigError."""
    given = {name: getattr(arguments, name) for name in Request.model_fields if hasattr(arguments, name)}
    if "sbatch" in given:
        given["sbatch"] = dict(map(_option, given["sbatch"]))
    asked = ask(given, arguments.site, before)
    if arguments.after:
        cluster = asked.values.get("cluster", "slurm")
        if cluster != "slurm":
            raise ConfigError(f"--after waits for jobs of Slurm, and --cluster {cluster} starts at once")
        from .plan import dependency_on

        own = asked.values.get("dependency")
        asked.put(Layer(dependency_on(arguments.after, *([own] if own else [])), lambda key: "--after"))
    return asked


def _option(word: str) -> tuple[str, str | bool]:
    name, equals, value = word.lstrip("-").partition("=")
    if not name or (equals and not value):
        raise ConfigError(
            f"--sbatch {word!r} is no option of sbatch: give, for example, --sbatch mail-type=END or --sbatch exclusive"
        )
    return name.replace("-", "_"), value if equals else True


# Check what only this machine can tell: the commands of Slurm, and whether the nodes see a folder.

OF_ONE_MACHINE = ("tmpfs", "ramfs", "devtmpfs")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")  # folders that no two machines share


def check_commands() -> None:
    """Raise ConfigError where there is no Slurm."""
    missing = [name for name in ("sbatch", "scontrol", "sinfo", "srun") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"--cluster slurm: no {', '.join(missing)} here; submit from a login node of the cluster, "
            "or give --cluster local to run in the background of this machine"
        )


def check_folder(output_dir: Path, request: Request) -> None:
    """Raise ConfigError where the nodes of a job would not see `output_dir`, or nothing can be written there."""
    folder = output_dir.resolve()
    if "%" in str(output_dir):
        raise ConfigError(
            f"--output_dir {output_dir} has a %, which Slurm replaces in the names of logs: leave it out"
        )
    if request.shared_folders:
        if not any(folder.is_relative_to(root.resolve()) for root in request.shared_folders):
            roots = ", ".join(map(str, request.shared_folders))
            raise ConfigError(
                f"--output_dir {output_dir} is in none of the folders that every node sees "
                f"({request.origin('shared_folders')}: {roots})"
            )
    elif any(folder.is_relative_to(root) for root in TEMPORARY) or _file_system(folder) in OF_ONE_MACHINE:
        raise ConfigError(
            f"--output_dir {output_dir} is on this machine alone, and the nodes of the job would not see it: give a "
            "folder on a shared disk; if it is one, name it under shared_folders in the site file, or give --unchecked"
        )
    above = nearest_folder(folder)
    if not above.is_dir():
        raise ConfigError(f"--output_dir {output_dir} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {output_dir} cannot be written: {above} is not yours to write")


def _file_system(folder: Path) -> str:
    """Return the kind of file system of `folder`, existing or not, by its kernel name; empty if unknown."""
    above = nearest_folder(folder)
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    inside = [point for point in mounts if above.is_relative_to(point)]
    return mounts[max(inside, key=lambda point: len(point.parts))] if inside else ""
