"""The flags of `graftvit submit` and `resume`: a flag for each resource, under sbatch's names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from ...models.errors import ConfigError
from ..flags import Parser
from .settings import ClusterConfig, load_cluster, site_file

ONLY_IN_THE_SITE_FILE = ("shared_folders",)


def add_cluster_flags(parser: Parser) -> None:
    """A flag for each field of `ClusterConfig`, and `--site`."""
    group = parser.add_argument_group("cluster", f"What the job asks for. Defaults come from {site_file()}.")
    for name, field in ClusterConfig.model_fields.items():
        if name in ONLY_IN_THE_SITE_FILE:
            continue
        keywords: dict[str, Any] = {"metavar": name.upper()}
        if name == "cluster":
            keywords = {"choices": get_args(field.annotation)}
        elif name == "setup":
            keywords = {"metavar": "LINE", "action": "append"}
        elif name == "sbatch":
            keywords = {"metavar": "OPTION[=VALUE]", "action": "append"}
        default = "" if field.default in (None, (), {}) else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **keywords)
    group.add_argument("--site", type=Path, metavar="FILE", help="another site file")
    group.add_argument(
        "--unchecked",
        action="store_true",
        help="skip the checks of folder, resources and data, which may exist on the nodes alone",
    )


def cluster_of(arguments: argparse.Namespace, base: dict[str, Any] | None = None) -> ClusterConfig:
    """The resources that the flags ask for, over `base` or the site file. Raises ConfigError."""
    given: dict[str, Any] = dict(base or {})
    for name in ClusterConfig.model_fields:
        if hasattr(arguments, name) and name != "sbatch":
            given[name] = getattr(arguments, name)
    if hasattr(arguments, "sbatch"):
        given["sbatch"] = {**given.get("sbatch", {}), **dict(map(_option, arguments.sbatch))}
    return load_cluster(given, arguments.site)


def _option(word: str) -> tuple[str, str | bool]:
    name, equals, value = word.lstrip("-").partition("=")
    if not name or (equals and not value):
        raise ConfigError(
            f"--sbatch {word!r} is no option of sbatch: give, for example, --sbatch mail-type=END or --sbatch exclusive"
        )
    return name.replace("-", "_"), value if equals else True
