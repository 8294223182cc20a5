"""The flags of `graftvit submit` and `resume`: a flag for each resource, under sbatch's names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from ...models.errors import ConfigError
from ..flags import Parser, run_folder
from .layers import Asked, Layer, ask, site_file
from .settings import ClusterConfig

ONLY_IN_THE_SITE_FILE = ("shared_folders",)


def add_cluster_flags(parser: Parser) -> None:
    """A flag for each field of `ClusterConfig`, and `--site`."""
    group = parser.add_argument_group("cluster", f"What the job asks for. Defaults come from {site_file()}.")
    for name, info in ClusterConfig.model_fields.items():
        if name in ONLY_IN_THE_SITE_FILE:
            continue
        keywords: dict[str, Any] = {"metavar": name.upper()}
        if name == "cluster":
            keywords = {"choices": get_args(info.annotation)}
        elif name in ("setup", "node_setup"):
            keywords = {"metavar": "LINE", "action": "append"}
        elif name == "sbatch":
            keywords = {"metavar": "OPTION[=VALUE]", "action": "append"}
        default = "" if info.default in (None, (), {}) else f" (default: {info.default})"
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
    """The resources that the flags ask for, over those of `before` and of the site. Raises ConfigError."""
    given = {
        name: getattr(arguments, name) for name in ClusterConfig.model_fields if hasattr(arguments, name)
    }
    if "sbatch" in given:
        given["sbatch"] = dict(map(_option, given["sbatch"]))
    asked = ask(given, arguments.site, before)
    if arguments.after:
        cluster = asked.values.get("cluster", "slurm")
        if cluster != "slurm":
            raise ConfigError(f"--after waits for jobs of Slurm, and --cluster {cluster} starts at once")
        from .chaining import dependency_on

        own = asked.values.get("dependency")
        asked.put(Layer(dependency_on(arguments.after, *([own] if own else [])), lambda key: "--after"))
    return asked


def cluster_of(arguments: argparse.Namespace, before: dict[str, Any] | None = None) -> ClusterConfig:
    """As `asked_by`, checked. Raises ConfigError."""
    return asked_by(arguments, before).config()


def _option(word: str) -> tuple[str, str | bool]:
    name, equals, value = word.lstrip("-").partition("=")
    if not name or (equals and not value):
        raise ConfigError(
            f"--sbatch {word!r} is no option of sbatch: give, for example, --sbatch mail-type=END or --sbatch exclusive"
        )
    return name.replace("-", "_"), value if equals else True
