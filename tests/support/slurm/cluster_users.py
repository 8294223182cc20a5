"""A user who submits: a folder with a recipe, a site file, and what the flags of a submission ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftvit.launch.flags import command_parser, parse_command
from graftvit.launch.load_config import parse_override
from graftvit.launch.slurm.batch import Batch
from graftvit.launch.slurm.plan import plan_run
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.site_file import add_cluster_flags, asked_by, site_file
from graftvit.models.errors import ConfigError
from support.runs.engine_runs import config, make_teacher

LOCAL = Request(cluster="local", gpus_per_node=0)


def write_site(**values: Any) -> Path:
    """The user's own site file."""
    path = site_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_program(folder: Path, name: str, lines: str) -> None:
    """A command of Slurm that is a script of a shell."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)


def user_with_recipe(
    root: Path, monkeypatch: pytest.MonkeyPatch, surroundings: Mapping[str, str], **site: Any
) -> Path:
    """A user in `root` with a small recipe `run.yaml` for `root/run`, and nothing of another cluster around."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    homes = {"XDG_CONFIG_HOME": str(root / "xdg"), "XDG_STATE_HOME": str(root / "state")}
    for name, value in {**surroundings, **homes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(root)
    write_site(shared_folders=[str(root)], cpus_per_task=1, **site)
    run = config(root / "run", make_teacher(root / "teacher"))
    (root / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return root


def planned(recipe: Path | str | None, *words: str, sweep: Sequence[str] = ()) -> Batch:
    """What these settings would submit on this machine; nothing is written."""
    return plan_run(None if recipe is None else str(recipe), list(map(parse_override, words)), sweep, LOCAL)


def asked(*words: str, before: dict[str, Any] | None = None) -> Request:
    """What these flags ask for, over the site files and what was asked for before."""
    parser = command_parser("submit", "", [])
    add_cluster_flags(parser)
    return asked_by(parse_command(parser, words)[0], before)


def refusal(*words: str) -> str:
    """The one sentence in which these flags are refused."""
    with pytest.raises(ConfigError) as raised:
        asked(*words)
    assert "\n" not in str(raised.value)
    return str(raised.value)
