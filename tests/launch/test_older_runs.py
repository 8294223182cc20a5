"""A run folder of an older version is resumed, measured and taught from; it holds what was a default then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.load_config import dump_config, load_config, load_stages
from graftvit.launch.slurm.plan import plan_run
from graftvit.launch.slurm.request import Request
from graftvit.launch.slurm.submit import check_quickly
from graftvit.models.errors import ConfigError
from graftvit.models.plain_yaml import parse_yaml, write_yaml
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.train import train
from graftvit.transfer.first_checks import check_first
from graftvit.transfer.setting import as_inherited
from support.runs.engine_runs import config, make_teacher
from support.runs.typed import Typed

pytestmark = pytest.mark.usefixtures("few_digits")

OLDER: dict[str, Any] = {
    "optim.warmup_epochs": 5, "pretrain.decoder_dim": 512, "pretrain.decoder_depth": 8, "pretrain.decoder_heads": 16,
}  # fmt: skip
"""Defaults of an older version. Today's follow the length of the run and the encoder."""
NEWER = ("report",)
"""Settings of `engine` that it did not have."""


def older_run(folder: Path) -> RunConfig:
    """The settings of a short run of an older version, as its folder holds them."""
    run = config(folder / "old", make_teacher(folder / "teacher"))
    for key, value in OLDER.items():
        section, _, name = key.partition(".")
        run = run.model_copy(update={section: getattr(run, section).model_copy(update={name: value})})
    return as_inherited(run, OLDER)


def as_written(run: RunConfig) -> dict[str, Any]:
    """The content of `config.yaml` as the older version wrote it."""
    content: dict[str, Any] = parse_yaml(dump_config(run))
    for name in NEWER:
        del content["engine"][name]
    return content


def test_a_run_of_an_older_version_is_resumed_measured_and_taught_from(tmp_path: Path, typed: Typed) -> None:
    run = older_run(tmp_path)
    train(run)
    old = run.output_dir
    (old / "config.yaml").write_text(write_yaml(as_written(run)))
    for again in (
        load_config(old, {"optim.epochs": 3}),
        config(old, tmp_path / "teacher", optim={"epochs": 4, "warmup_epochs": None}),
    ):
        assert train(again).steps == 8 * again.optim.epochs
        assert load_config(old).optim.warmup_epochs == 5
    (old / "config.yaml").write_text(write_yaml(as_written(load_config(old))))
    typed("train", old, "--epochs", 5, "--dry_run")
    typed("evaluate", old, "--device", "cpu", "--workers", 0)
    typed("train --model same --dataset digits --dry_run --teacher", old, "--output_dir", tmp_path / "new")
    typed("jobs", old, code=2)  # it was not submitted
    local = Request(cluster="local", gpus_per_node=0)
    check_quickly(plan_run(str(old), [], (), local))


def test_stages_of_an_older_version_are_as_they_were_frozen(tmp_path: Path) -> None:
    run = as_written(older_run(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml({"stages": [{"name": name, **run} for name in ("first", "second")]}))
    for stage in load_stages(path):
        check_first(stage.config)
        assert stage.config.pretrain.decoder_dim == 512


def test_what_a_user_gives_beside_an_older_run_is_refused(tmp_path: Path) -> None:
    run = older_run(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(as_written(run)))
    check_first(load_config(path))
    with pytest.raises(ConfigError, match=r"pretrain.decoder_depth=8 changes nothing"):
        check_first(load_config(path, ["decoder_depth=8"]))
    path.write_text(
        write_yaml({"pretrain": {"decoder_depth": 8}, "teacher": {"source": "vit_tiny_patch16_224"}})
    )
    with pytest.raises(ConfigError, match=r"pretrain.decoder_depth=8 changes nothing"):
        check_first(load_config(path))
