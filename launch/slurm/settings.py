"""What is asked of a cluster: flags, site file, defaults. The names are those of sbatch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...models.errors import ConfigError, did_you_mean
from ..yaml_text import parse_yaml


class ClusterConfig(BaseModel):
    """Resources and surroundings of a job."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    cluster: Literal["slurm", "local", "debug"] = Field(
        "slurm", description="slurm, local (this machine, in the background) or debug (this process)"
    )
    nodes: int = Field(1, gt=0, description="machines")
    gpus_per_node: int = Field(1, ge=0, description="GPUs of a node; 0 for a run on CPUs")
    tasks_per_node: int | None = Field(None, gt=0, description="processes of a node; one a GPU by default")
    cpus_per_task: int | None = Field(
        None, gt=0, description="cores of a process; one more than data.workers by default"
    )
    mem: str | None = Field(None, description="memory of a node, as in 240G; the site's default if not given")
    time: str = Field("24:00:00", description="limit of one attempt: minutes, H:MM:SS or D-HH:MM:SS")
    partition: str | None = Field(None, description="partition; the site's default if not given")
    account: str | None = Field(None, description="account that pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features that nodes must have, as in a100|h100")
    exclude: str | None = Field(None, description="nodes that must not be taken, as in gpu[03-05]")
    comment: str | None = Field(None, description="comment of the job")
    dependency: str | None = Field(None, description="jobs to wait for, as in afterok:1234")
    array_parallelism: int = Field(16, gt=0, description="cells of an array that run at a time")
    signal_delay: int = Field(
        90, gt=0, description="seconds before the limit at which the job is told to save"
    )
    setup: tuple[str, ...] = Field((), description="shell lines before the run: module loads, conda")
    container: str | None = Field(None, description="image for `srun --container-image` (enroot, pyxis)")
    container_mounts: str | None = Field(None, description="for `srun --container-mounts`")
    sbatch: dict[str, str | int] = Field({}, description="other options of sbatch by their long names")
    shared_folders: tuple[Path, ...] = Field(
        (), description="folders that every node sees; a run must lie in one of them"
    )

    @property
    def tasks(self) -> int:
        """Processes of a node: one a GPU, one where there is none."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """`time` in minutes, rounded up, as Slurm does. Raises ConfigError."""
        return parse_time(self.time)


def parse_time(text: str) -> int:
    """Minutes of a time limit in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
    days, dash, rest = text.partition("-") if "-" in text else ("0", "", text)
    try:
        parts = [int(part) for part in rest.split(":")]
        count = int(days)
    except ValueError:
        parts, count = [], 0
    if not 1 <= len(parts) <= 3 or min([count, *parts]) < 0:
        raise ConfigError(
            f"--time {text!r} is no time limit: give minutes, H:MM:SS or D-HH:MM:SS, as in 2-12:00:00"
        )
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = ((count * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(f"--time {text!r} leaves no time to run")
    return -(-total // 60)


def site_file() -> Path:
    """Where a user keeps what holds for the cluster: `$XDG_CONFIG_HOME/graftvit/cluster.yaml`."""
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "graftvit" / "cluster.yaml"


def load_cluster(given: Mapping[str, Any], site: Path | None = None) -> ClusterConfig:
    """Defaults, then the site file, then what was given. Raises ConfigError that names the file or the flag."""
    path = site or site_file()
    if site is not None and not site.is_file():
        raise ConfigError(f"--site {site} does not exist")
    base = _read(path) if path.is_file() else {}
    values = {**base, **given}
    try:
        config = ClusterConfig.model_validate(values)
    except ValidationError as error:
        finding = error.errors()[0]
        name = str(finding["loc"][0])
        where = f"--{name}" if name in given else f"{path}: {name}"
        field = ClusterConfig.model_fields.get(name)
        meaning = "" if field is None else f" ({field.description})"
        raise ConfigError(f"{where} is {values[name]!r}: {finding['msg']}{meaning}") from error
    _ = config.minutes
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, for example 'partition: gpu'")
    for key in content:
        if key not in ClusterConfig.model_fields:
            raise ConfigError(
                f"{path}: unknown key {key!r}; {did_you_mean(str(key), ClusterConfig.model_fields)}"
            )
    if isinstance(content.get("setup"), str):
        content["setup"] = content["setup"].splitlines()
    return {**content, "sbatch": dict(content.get("sbatch") or {})}
