"""Read the resources of a job from flags, a profile, the environment and the site file. The first one wins.

Each resource is a flag of `graftvit submit` and `resume`, named as in sbatch.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil

from ...checkpoints.files import is_there, nearest_folder, read_regular
from ...models.errors import ConfigError, did_you_mean
from ...models.plain_yaml import MAX_BYTES, YamlError, parse_yaml
from ..flags import Parser, run_folder
from .request import MEMORY, Request, gpus_in, option_name, without_gpus

VARIABLES = {
    f"SBATCH_{name.upper()}": name
    for name in (
        "gpus_per_node", "gres", "gpu_bind", "mem_per_cpu", "mem_per_gpu", "partition", "account", "qos", "reservation",
        "constraint",
    )
} | {"SBATCH_MEM_PER_NODE": "mem", "SBATCH_TIMELIMIT": "time"}  # fmt: skip
"""Variables that sbatch reads, and the resource that each sets."""
OPTION_VARIABLES = {
    f"SBATCH_{name.upper()}": name
    for name in (
        "acctg_freq", "batch", "core_spec", "delay_boot", "distribution", "exclusive", "gpu_freq", "gres_flags", "hint",
        "mem_bind", "network", "power", "profile", "spread_job", "thread_spec", "threads_per_core", "use_min_nodes",
        "wait_all_nodes", "wckey",
    )
} | {"SBATCH_REQ_SWITCH": "switches"}  # fmt: skip
"""Those that a run can accept as other options."""
Layer = tuple[Mapping[str, Any], Callable[[str], str]]
"""Values of one origin, and how an error and the dry run name the origin of each; `sbatch.hold` for an option."""
WITHOUT_VALUE = ("exclusive", "spread_job", "use_min_nodes")


def site_file() -> Path:
    """Return the user's own file of cluster settings: `$XDG_CONFIG_HOME/graftvit/cluster.yaml`."""
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "graftvit" / "cluster.yaml"


def shared_site_files() -> list[Path]:
    """Return the administrator's files for all users: `/etc/xdg/graftvit/cluster.yaml`. The first counts most."""
    roots = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    return [Path(root) / "graftvit" / "cluster.yaml" for root in roots.split(":") if root]


def ask(
    given: Mapping[str, Any], site: Path | None = None, before: Mapping[str, Any] | None = None
) -> Request:
    """Lay all origins over each other.

    Args:
        given: Of flags.
        site: A site file in place of the user's own and of those for all users.
        before: What the run asked for when it was submitted.

    Raises:
        ConfigError: a value, a file or a key in it is not valid, or there is no such profile.
    """
    files = [site] if site is not None else [*reversed(shared_site_files()), site_file()]
    contents = {path: _read_site(path, needed=site is not None) for path in files}
    profiles: dict[str, Layer] = {}
    for path, content in contents.items():
        profiles |= _profiles(content.pop("profiles", None), path)

    def profile(name: Any, origin: str) -> Layer:
        if name not in profiles:
            valid = f"valid: {', '.join(profiles)}" if profiles else "it has none"
            raise ConfigError(f"{origin} {name!r} is not among the profiles of {files[-1]}: {valid}")
        return profiles[name]

    usual = [path for path, content in contents.items() if content.get("profile") is not None][-1:]
    layers: list[Layer] = []
    for path, content in contents.items():
        layers.append((content, partial("{}: {}".format, path)))
        if path in usual and "profile" not in given:
            layers.append(profile(content["profile"], f"{path}: profile"))
    layers += [_from_environment(), (before or {}, "{} as before".format)]
    if "profile" in given:
        layers.append(profile(given["profile"], "--profile"))
    layers.append((given, lambda key: f"--{key.partition('.')[0]}"))
    return Request.checked(*_laid(layers))


def _laid(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Lay the values of each layer over those before it; return the values that win, and the origin of each."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, origin in layers:
        for name, value in layer.items():
            _make_room(values, name, value)
        for name, value in layer.items():
            origins[name], below = origin(name), values.get(name)
            values[name] = value
            if name == "sbatch" and isinstance(value, Mapping):
                options = {option_name(str(key)): one for key, one in value.items()}
                origins |= {f"sbatch.{key}": origin(f"sbatch.{key}") for key in options}
                values[name] = {**below, **options} if isinstance(below, Mapping) else options
    return values, origins


def _make_room(values: dict[str, Any], name: str, value: Any) -> None:
    """Take away what lies below and would contradict `value`."""
    if value is not None and name in MEMORY:
        for other in MEMORY:
            values.pop(other, None)
    if name == "gres" and isinstance(value, str) and gpus_in(value):
        values.pop("gpus_per_node", None)
    if name == "gpus_per_node" and value is not None and isinstance(values.get("gres"), str):
        values["gres"] = without_gpus(values["gres"])


def _from_environment() -> Layer:
    """Return what the user's environment sets for sbatch, which itself starts without it."""
    values: dict[str, Any] = {VARIABLES[name]: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    options: dict[str, Any] = {}
    for variable, name in OPTION_VARIABLES.items():
        value = os.environ.get(variable)
        if value is not None and name in WITHOUT_VALUE:
            options[name] = value if value in ("user", "mcs", "topo") else value not in ("0", "no")
        elif value:
            options[name] = value
    names = {name: variable for variable, name in VARIABLES.items()}
    names |= {f"sbatch.{name}": variable for variable, name in OPTION_VARIABLES.items()}
    return values | ({"sbatch": options} if options else {}), lambda key: names.get(key, key)


def describe(request: Request) -> str:
    """Return the requested resources, a line each with its origin; for others the defaults of `--help` hold."""
    rows = []
    for key, origin in request.origins.items():
        name, _, option = key.partition(".")
        value = request.sbatch.get(option) if option else getattr(request, name)
        if key not in ("sbatch", "shared_folders") and value not in (None, (), ""):
            shown = "; ".join(value) if isinstance(value, tuple) else value
            rows.append(f"  {option.replace('_', '-') or name:<18} {shown!s:<22} {origin}\n")
    taken = {*VARIABLES, *OPTION_VARIABLES}
    if ignored := sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in taken):
        rows.append(f"  left out, as it would break what a run needs: {', '.join(ignored)}\n")
    return f"asked of the cluster:\n{''.join(rows)}" if rows else ""


def _profiles(content: Any, path: Path) -> dict[str, Layer]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(one, dict) for one in content.values()):
        raise ConfigError(f"{path}: profiles must hold names with keys, as in 'debug: {{partition: debug}}'")
    for name, values in content.items():
        _check_keys(values, f"{path}: profiles.{name}", set(Request.model_fields) - {"profile"})
    return {
        str(name): (values, partial("{}: profiles.{}.{}".format, path, name))
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
        text = " ".join(f"{info.description}{default}".split()).replace("%", "%%")
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


def asked_by(arguments: argparse.Namespace, before: Mapping[str, Any] | None = None) -> Request:
    """Return the resources of the flags, over those of `before` and of the site. Raises ConfigError."""
    given = {name: getattr(arguments, name) for name in Request.model_fields if hasattr(arguments, name)}
    options = [word.partition("=") for word in given.get("sbatch", ())]
    if options:
        given["sbatch"] = {option_name(name): value if equals else True for name, equals, value in options}
    request = ask(given, arguments.site, before)
    if not arguments.after:
        return request
    if request.cluster != "slurm":
        raise ConfigError(f"--after waits for jobs of Slurm, and --cluster {request.cluster} starts at once")
    from .plan import dependency_on

    more = dependency_on(arguments.after, request.dependency)
    values = {name: getattr(request, name) for name in request.model_fields_set}
    values |= {**more, "sbatch": {**request.sbatch, **more.get("sbatch", {})}}
    return Request.checked(values, {**request.origins, **dict.fromkeys(more, "--after")})


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


def _file_system(folder: Path) -> str:
    """Return the kind of file system of `folder`, existing or not, by its kernel name; empty if unknown."""
    above = nearest_folder(folder)
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    inside = [point for point in mounts if above.is_relative_to(point)]
    return mounts[max(inside, key=lambda point: len(point.parts))] if inside else ""
