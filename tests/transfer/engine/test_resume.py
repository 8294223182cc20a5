"""Which settings may change when a run goes on."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import graftvit
import pytest
import torch
from graftvit.launch.cli import main
from graftvit.launch.load_config import dump_config
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import CheckpointError, ConfigError, DataError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.resume_check import (
    Position,
    as_begun,
    check_length,
    check_same_run,
    check_same_split,
    refuse_existing,
    settings,
)
from graftvit.transfer.engine.stages import Stage, train_stages
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config


def saved(**sections: Any) -> dict[str, Any]:
    """Meta of a state as it comes back from JSON."""
    return json.loads(json.dumps({"config": settings(RunConfig(**sections)), "origins": {}}))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("seed", {"seed": 1}),
        ("mode", {"mode": "scratch"}),
        ("transfer.method", {"transfer": {"method": "copy"}}),
        ("transfer.layers", {"transfer": {"layers": [1, 2]}}),
        ("student.model_args", {"student": {"model_args": {"depth": 3}}}),
        ("teacher.source", {"teacher": {"source": "other"}}),
        ("optim.blr", {"optim": {"blr": 0.5}}),
        ("optim.betas", {"optim": {"betas": (0.5, 0.6)}}),
        ("optim.ema", {"optim": {"ema": 0.5}}),
        ("data.batch_size", {"data": {"batch_size": 7}}),
        ("data.label_seed", {"data": {"label_seed": 7}}),
    ],
)
def test_a_setting_that_matters_is_refused_by_name(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}.*was started with"):
        check_same_run(saved(), RunConfig(output_dir=Path("runs/mine"), **change))
    check_same_run(saved(**change), RunConfig(**change))


def test_the_default_folder_with_another_run_is_named_first() -> None:
    with pytest.raises(
        ConfigError, match=r"^runs/default, .*holds another run, .*seed=0, not 1: give --output_dir DIR"
    ):
        check_same_run(saved(), RunConfig(seed=1))


def test_numbers_of_an_older_default_are_those_of_the_run() -> None:
    """The defaults were 5 epochs and the decoder of ViT-L, which now follow the run and its model."""
    older = saved(
        optim={"warmup_epochs": 5}, pretrain={"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
    )
    check_same_run(older, RunConfig())
    begun = as_begun(RunConfig(), older)
    assert (begun.optim.warmup_epochs, begun.pretrain.decoder_dim, begun.pretrain.decoder_heads) == (
        5,
        512,
        16,
    )
    with pytest.raises(
        ConfigError, match=r"another run, which was started with pretrain.decoder_dim=512, not 256"
    ):
        check_same_run(older, RunConfig(pretrain={"decoder_dim": 256}))
    assert as_begun(RunConfig(), saved()) == RunConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": "elsewhere"},
        {"optim": {"epochs": 300}},
        {"optim": {"max_steps": 3}},
        {"optim": {"accum_iter": 3}},  # `elastic` has a say in it
        {"data": {"workers": 0, "data_path": "/moved"}},
        {"engine": {"log_interval": 3, "fsdp": True, "device": "cpu"}},
        {"student": {"compile": True, "grad_checkpointing": True}},
    ],
)
def test_a_setting_that_says_where_or_how_long_may_change(change: dict[str, Any]) -> None:
    check_same_run(saved(), RunConfig(**change))


def test_a_run_cannot_become_shorter_than_it_is() -> None:
    check_length(Position(step=5), 5)
    with pytest.raises(ConfigError, match="asks for 4 steps, but the run has done 5"):
        check_length(Position(step=5), 4)


def test_position_survives_json() -> None:
    position = Position(
        step=3, epoch=1, epoch_step=2, best=50.5, metrics={"test_top1": 50.5}, records=4, run_id="a"
    )
    assert Position(**json.loads(json.dumps(position.meta()))) == position


@pytest.mark.parametrize(
    ("text", "foreign"),
    [("name: webapp\n", True), ("[damaged", False), ("mode: scratch\nengine: {}\n", False)],
)
def test_settings_of_something_else_are_not_written_over(tmp_path: Path, text: str, foreign: bool) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) if foreign else nullcontext():
        refuse_existing(tmp_path, "auto")


def test_resume_never_leaves_an_existing_run_alone(tmp_path: Path) -> None:
    refuse_existing(tmp_path, "never")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ConfigError, match=r"already holds a run \(log.jsonl\).*engine.resume=never"):
        refuse_existing(tmp_path, "never")


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_no_run_begins_in_the_folder_of_a_model(teacher: Path, tmp_path: Path, resume: str) -> None:
    run = config(tmp_path / "run", teacher, engine={"resume": resume})
    graftvit.save(teacher, run.output_dir)
    before = sorted(tmp_path.rglob("*"))
    for starts in (train, describe_plan, lambda each: train_stages([Stage("only", each)])):
        with pytest.raises(ConfigError, match="holds a saved model"):
            starts(run)
    (tmp_path / "run.yaml").write_text(dump_config(run))
    for how in ([], ["--dry_run"]):
        assert main(["train", str(tmp_path / "run.yaml"), *how]) == 2
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "run.yaml"]


def test_a_run_beside_a_model_is_read_by_its_part_alone(teacher: Path, tmp_path: Path) -> None:
    """As older versions left it."""
    run = tmp_path / "run"
    train(config(run, teacher, optim={"max_steps": 2, "warmup_epochs": 0}))
    own = graftvit.load(run).state_dict()
    for path in teacher.iterdir():
        shutil.copy(path, run)
    with pytest.raises(CheckpointError, match="#last"):
        graftvit.load(run)
    for part in ("last", "student"):
        again = graftvit.load(f"{run}#{part}").state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in again.items())


def test_processes_of_which_some_have_no_test_images_stop() -> None:
    check_same_split([False, False])
    with pytest.raises(DataError, match="could open the validation split"):
        check_same_split([True, False])
