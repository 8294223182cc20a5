"""What is asked of a cluster: flags, site file, defaults. The names are those of sbatch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...models.errors import ConfigError, did_you_mean
from ...transfer.config import check_plain
from ..yaml_text import YamlError, parse_yaml, read_yaml

OF_THE_JOB = (
    "array", "error", "no_requeue", "ntasks", "ntasks_per_node", "open_mode", "output", "requeue", "signal", "wrap",
)  # fmt: skip
"""Options of sbatch that follow from what a run needs."""


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
    sbatch: dict[str, bool | str | int] = Field(
        {}, description="other options of sbatch by their long names, true for one without a value"
    )
    shared_folders: tuple[Path, ...] = Field(
        (), description="folders that every node sees; a run must lie in one of them"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_plain(cls, value: Any) -> Any:
        check_plain(value)
        return value

    @field_validator("time")
    @classmethod
    def _check_time(cls, text: str) -> str:
        try:
            parse_time(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return text

    @field_validator("mem")
    @classmethod
    def _check_memory(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"[0-9]+([KMGT]B?)?", text, re.IGNORECASE):
            raise ValueError("a size is a whole number with K, M, G or T, as in 240G")
        return text

    @field_validator("sbatch")
    @classmethod
    def _check_options(cls, options: dict[str, bool | str | int]) -> dict[str, bool | str | int]:
        named = {name.lstrip("-").replace("-", "_"): value for name, value in options.items()}
        for name in named:
            if name in cls.model_fields:
                raise ValueError(f"{name} has a flag and a key of its own, --{name}")
            if name in OF_THE_JOB:
                raise ValueError(f"{name.replace('_', '-')} follows from what the run needs")
        return {name: value for name, value in named.items() if value is not False}

    @field_validator("setup", mode="before")
    @classmethod
    def _split_lines(cls, lines: Any) -> Any:
        return lines.splitlines() if isinstance(lines, str) else lines

    @field_validator("shared_folders", mode="before")
    @classmethod
    def _expand(cls, folders: Any) -> Any:
        several = [folders] if isinstance(folders, str) else folders
        if not isinstance(several, list | tuple):
            return several
        return [
            Path(os.path.expandvars(one)).expanduser() if isinstance(one, str) else one for one in several
        ]

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
        """`time` in minutes, rounded up, as Slurm does."""
        return parse_time(self.time)


def parse_time(text: str) -> int:
    """Minutes of a time limit in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
    found = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text)
    if not found:
        raise ConfigError(f"{text!r} is no time limit: give minutes, H:MM:SS or D-HH:MM:SS, as in 2-12:00:00")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(f"{text!r} leaves no time to run")
    return -(-total // 60)


def site_file() -> Path:
    """Where a user keeps what holds for the cluster: `$XDG_CONFIG_HOME/graftvit/cluster.yaml`."""
    root = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(root) / "graftvit" / "cluster.yaml"


def load_cluster(given: Mapping[str, Any], site: Path | None = None) -> ClusterConfig:
    """Defaults, then the site file, then what was given. Raises ConfigError that names the file or the flag."""
    path = site or site_file()
    there = os.path.exists(path)  # noqa: PTH110 - no error for a name that none can have
    if site is not None and not there:
        raise ConfigError(f"--site {site} does not exist")
    base = _read(path) if there else {}
    merged = {**base, **given}
    if isinstance(base.get("sbatch"), dict) and "sbatch" in given:  # options that both name are as given
        merged["sbatch"] = {**base["sbatch"], **given["sbatch"]}
    try:
        return ClusterConfig.model_validate(merged)
    except ValidationError as error:
        finding = error.errors()[0]
        name = str(finding["loc"][0])
        where = f"--{name}" if name in given else f"{path}: {name}"
        what = finding["msg"].removeprefix("Value error, ")
        meaning = ClusterConfig.model_fields[name].description
        raise ConfigError(f"{where} is {merged[name]!r}: {what} ({meaning})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(read_yaml(path))
    except YamlError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, for example 'partition: gpu'")
    for key in content:
        if key not in ClusterConfig.model_fields:
            raise ConfigError(
                f"{path}: unknown key {key!r}; {did_you_mean(str(key), ClusterConfig.model_fields)}"
            )
    return content
