"""Define the resources of a job: each with its help, its check and its option of sbatch.

The names are those of sbatch. `site_file.py` says where the values come from.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ...models.errors import ConfigError
from ...transfer.setting import check_plain, check_switch

# Parse and compare GPUs by type and other generic resources, as sbatch takes them.


def parse_gpus(text: str) -> dict[str, int]:
    """`4` as {"": 4}, `a100:4` as {"a100": 4}, `a100:2,h100:1` as both. Raises ValueError."""
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(?:([A-Za-z][\w.-]*):)?([0-9]+)", part, re.ASCII)
        if match is None or (match[1] or "") in found:
            raise ValueError("a number, or types with their numbers, as in a100:4 or a100:2,h100:1")
        found[match[1] or ""] = int(match[2])
    return found


def gpus_in(gres: str | None) -> dict[str, int]:
    """Return the GPUs of `gpu:a100:4,tmpdisk:100` by type; `gpu` and `gpu:a100` count as one."""
    found: dict[str, int] = {}
    for part in (gres or "").split(","):
        if match := re.fullmatch(r"(?:gres/)?gpu(?::(.*?))??(?::([0-9]+))?", part.strip()):
            found[match[1] or ""] = found.get(match[1] or "", 0) + int(match[2] or 1)
    return found


def without_gpus(gres: str) -> str | None:
    """Return the other resources of the request; None if there are none."""
    return ",".join(part.strip() for part in gres.split(",") if not gpus_in(part)) or None


OF_THE_JOB = (
    "array", "clusters", "error", "gpus", "gpus_per_task", "input", "job_name", "no_kill", "no_requeue", "ntasks",
    "help", "ntasks_per_gpu", "ntasks_per_node", "open_mode", "output", "parsable", "quiet", "requeue", "signal",
    "test_only", "usage", "verbose", "version", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch that follow from what a run needs, or that would keep it from surviving."""
OF_ANOTHER_MEANING = ("container", "profile")
"""Options of sbatch whose names are given to something else here."""
MEMORY = ("mem", "mem_per_cpu", "mem_per_gpu")
"""Ways to ask for memory, which exclude each other."""
OF_SEVERAL_LINES = ("setup", "node_setup", "shared_folders")
"""Settings that are not written into a line of options."""
PASSED = (
    "gres", "gpu_bind", *MEMORY, "partition", "account", "qos", "reservation", "constraint", "exclude", "nodelist",
    "comment", "dependency",
)  # fmt: skip
"""Resources that the script has under the same name, with the value as it was given."""


def memory_of(resources: Mapping[str, Any]) -> str:
    """Return the name in `MEMORY` by which memory was asked for; `mem` where it was not."""
    return next((name for name in MEMORY if resources.get(name) is not None), "mem")


def _lines(value: Any) -> Any:
    return value.splitlines() if isinstance(value, str) else value


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _expanded(value: Any) -> Any:
    return Path(os.path.expandvars(value)).expanduser() if isinstance(value, str) else value


Lines = Annotated[tuple[str, ...], BeforeValidator(_lines)]
Folder = Annotated[Path, BeforeValidator(_expanded)]


class Request(BaseModel):
    """Resources and surroundings of a job."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, use_attribute_docstrings=True
    )
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm, local (this machine, in the background) or debug (this process)"""
    profile: str | None = None
    """one of the `profiles` of the site file: what it names goes before the rest of the file"""
    nodes: int = Field(1, gt=0)
    """machines"""
    gpus_per_node: str | None = None
    """GPUs of a node, with their type where it matters, as in a100:4; 0 for a run on CPUs; 1 by default"""
    gres: str | None = None
    """generic resources of a node, as in tmpdisk:100 or gpu:a100:4,tmpdisk:100, whose GPUs are those of
    --gpus_per_node"""
    gpu_bind: str | None = None
    """which GPUs a process sees, as in closest; all of its node by default"""
    tasks_per_node: int | None = Field(None, gt=0)
    """processes of a node; one a GPU by default"""
    cpus_per_task: int | None = Field(None, gt=0)
    """cores of a process; one more than data.workers by default"""
    mem: str | None = None
    """memory of a node, as in 240G, a bare number in megabytes; the site's default if not given"""
    mem_per_cpu: str | None = None
    """memory for each core, in place of --mem"""
    mem_per_gpu: str | None = None
    """memory for each GPU, in place of --mem"""
    time: str = "24:00:00"
    """limit of one attempt: minutes, H:MM:SS or D-HH:MM:SS"""
    partition: str | None = None
    """partition, or several with commas, of which any will do; the site's default if not given"""
    account: str | None = None
    """account that pays"""
    qos: str | None = None
    """quality of service"""
    reservation: str | None = None
    """reservation to run in"""
    constraint: str | None = None
    """features that nodes must have, as in a100|h100"""
    exclude: str | None = None
    """nodes that must not be taken, as in gpu[03-05]"""
    nodelist: str | None = None
    """nodes that must be among those taken; the job waits for each of them, also after it has died"""
    comment: str | None = None
    """comment of the job"""
    dependency: str | None = None
    """jobs to wait for, as in afterok:1234; --after waits for the job of a run folder"""
    mail: str | None = None
    """whom Slurm writes to and when, as in me@example.org, FAIL,me@example.org or END,FAIL; END,FAIL where no event is
    named. A restart is neither of them: REQUEUE is"""
    array_parallelism: int = Field(16, gt=0)
    """cells of an array that run at a time"""
    signal_delay: int = Field(90, gt=0, le=65_535)
    """seconds before the limit at which the job is told to save"""
    max_restarts: int = Field(3, ge=0)
    """restarts in a row without a new state, after a failure that may pass"""
    restart_wait: int = Field(30, ge=0)
    """seconds before the first of them; each other waits twice as long"""
    setup: Lines = ()
    """shell lines before the run, on its first node, which its processes take their environment from: module loads,
    conda"""
    node_setup: Lines = ()
    """shell lines that run once on every node before the processes start, after `setup`: to unpack data, to make a
    folder. The processes see the files, but not the environment that they leave; the job ends at the first line that
    fails"""
    container: str | None = None
    """image that the processes run in: x.sif by `apptainer exec`, anything else by enroot and pyxis (`srun
    --container-image`)"""
    container_mounts: str | None = None
    """folders of the node in it, as in /scratch:/scratch,/data:/data"""
    pack: Literal["no", "tar", "squashfs"] = "no"
    """put the environment and the code into archives, which a task on each node unpacks to its local disk: for
    environments that nodes do not see, or that many processes read slowly"""
    pack_folder: Folder | None = None
    """where packs are kept for all runs; by default each run keeps its own"""
    on_event: str | None = None
    """command that gets a JSON of what happens to a run on its standard input: start, restart, failure, finish, stop,
    and no progress for `event_minutes`"""
    event_minutes: int = Field(30, gt=0)
    """minutes without progress after which `on_event` is told"""
    sbatch: dict[str, bool | str | int] = {}
    """other options of sbatch by their long names; hold or hold=true for one without a value"""
    shared_folders: Annotated[tuple[Folder, ...], BeforeValidator(_one_or_more)] = ()
    """folders that every node sees; a run must lie in one of them"""

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        check_plain(value)
        if info.field_name != "sbatch":
            check_switch(value, cls.model_fields[str(info.field_name)].annotation)
        if info.field_name not in OF_SEVERAL_LINES:
            check_line(value)
        return value

    @field_validator("time", "gpus_per_node")
    @classmethod
    def _check_counts(cls, text: str | None, info: ValidationInfo) -> str | None:
        try:
            if text is not None:
                (parse_time if info.field_name == "time" else parse_gpus)(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return text

    @field_validator("sbatch")
    @classmethod
    def _check_options(cls, options: dict[str, bool | str | int]) -> dict[str, bool | str | int]:
        switches = {"true": True, "false": False}
        named = {
            option_name(name): switches.get(str(value).lower(), value) for name, value in options.items()
        }
        for name in named:
            if name in cls.model_fields and name not in OF_ANOTHER_MEANING:
                raise ValueError(f"{name} has a flag and a key of its own, --{name}")
            if any(option.startswith(name) for option in OF_THE_JOB):  # sbatch takes short forms, too
                raise ValueError(f"{name.replace('_', '-')} follows from what the run needs")
        return {name: value for name, value in named.items() if value is not False}

    @model_validator(mode="after")
    def _check_together(self) -> Request:
        memory = [name for name in MEMORY if getattr(self, name) is not None]
        if len(memory) > 1:
            raise ValueError(f"{' and '.join(memory)} exclude each other: give one of them")
        if self.gpus_per_node is not None and gpus_in(self.gres):
            raise ValueError("gpus_per_node and the GPUs of gres are the same: give one of them")
        return self

    def __eq__(self, other: object) -> bool:
        """Compare what is asked for, whatever the origins."""
        return isinstance(other, Request) and dict(self) == dict(other)

    @classmethod
    def checked(cls, values: Mapping[str, Any], origins: dict[str, str]) -> Request:
        """Return the request, with the origin of each value as an error names it. Raises ConfigError."""
        try:
            found = cls.model_validate(values)
        except ValidationError as error:
            finding = error.errors()[0]
            what = finding["msg"].removeprefix("Value error, ")
            if finding["loc"]:
                name = str(finding["loc"][0])
                what = f"{origins[name]} is {values[name]!r}: {what} ({cls.model_fields[name].description})"
            raise ConfigError(what) from error
        found._origins = origins
        return found

    @property
    def origins(self) -> Mapping[str, str]:
        """The origin of each value; `sbatch.hold` is an option of sbatch."""
        return self._origins

    def origin(self, name: str) -> str:
        """Return how an error names a resource: its flag, or the variable or the file that it is from."""
        return self._origins.get(name, f"--{name}")

    def said(self, name: str) -> str:
        """Return the request as an error begins: `--nodes is 4`, `SBATCH_PARTITION is gpu`."""
        default = "" if name in self.model_fields_set else " by default"
        return f"{self.origin(name)} is {getattr(self, name)}{default}"

    @property
    def gpus(self) -> Mapping[str, int]:
        """GPUs of a node by type, "" for any; those of `gres` where it names some."""
        if self.gpus_per_node is None and (named := gpus_in(self.gres)):
            return named
        return parse_gpus("1" if self.gpus_per_node is None else self.gpus_per_node)

    @property
    def gpu_count(self) -> int:
        """GPUs of a node, of whatever type."""
        return sum(self.gpus.values())

    @property
    def tasks(self) -> int:
        """Return the number of processes of a node: one for each GPU, or one without a GPU."""
        return self.tasks_per_node or max(1, self.gpu_count)

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """`time` in minutes, rounded up, as Slurm does."""
        return parse_time(self.time)

    def options(self) -> dict[str, bool | str | int]:
        """Return the script's options of sbatch, by their long names."""
        found = {name: value for name in PASSED if (value := getattr(self, name)) is not None}
        if not self.gpu_count:  # of a site whose other runs have GPUs
            found = {name: value for name, value in found.items() if name not in ("gpu_bind", "mem_per_gpu")}
        elif not gpus_in(self.gres):
            found["gpus_per_node"] = self.gpus_per_node or "1"
        words = self.mail.split(",") if self.mail else []
        events = [word.upper() for word in words if "@" not in word] or ["END", "FAIL"]
        if words:
            found["mail_type"] = ",".join(events)
        if users := [word for word in words if "@" in word]:
            found["mail_user"] = ",".join(users)
        return {**found, **self.sbatch}


def check_line(value: Any) -> None:
    """ValueError for text that would end its line of a file or the batch script, or steer a terminal that shows it."""
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else [value]
    for char in "".join(part for part in parts if isinstance(part, str)):
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError("it must be one line of UTF-8, without control characters")


def option_name(text: str) -> str:
    """`--mail-type` as `mail_type`."""
    return text.lstrip("-").replace("-", "_")


def parse_time(text: str) -> int:
    """Return minutes of a time limit in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
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
