"""The state of an optimizer has all that its next step depends on, and an optimizer that cannot run is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import OptimConfig
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.optim import create_optimizer
from graftvit.transfer.engine.run_state import capture_optimizer, restore_optimizer
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, make_teacher
from torch import nn

NAMES = ["adamw", "sgd", "lamb", "adan", "adamp", "muon", "adafactor", "lion", "nadamw", "radamw"]


def make(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    return model, create_optimizer(model, model, OptimConfig(opt=name), 1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    model(images).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    model, optimizer = make(name)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, numbers = capture_optimizer(model, optimizer, keep=True)
    tensors = {key: value.clone() for key, value in tensors.items()}
    other, restored = make(name)
    other.load_state_dict(model.state_dict())
    restore_optimizer(tensors, numbers, other, restored)
    for seed in (3, 4):
        step(model, optimizer, seed)
        step(other, restored, seed)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["adamp", "muon"])
def test_the_dry_run_counts_the_slots_of_an_optimizer_that_looks_at_numbers(
    name: str, tmp_path: Path
) -> None:
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"), optim={"opt": name})
    built = dry_run(run, 1, here=True)
    assert built.footprint.optimizer >= 4 * sum(
        p.numel() for p in built.parts.task.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"opt": "kron"}, "keeps lists of matrices"),
        ({"opt": "adahessian"}, "second derivatives"),
        ({"betas": (0.9, 1.5)}, "cannot be used here: .*1.5"),
    ],
)
def test_an_optimizer_that_cannot_run_is_refused(settings: dict[str, object], sentence: str) -> None:
    model = nn.Linear(2, 2)
    optim = OptimConfig.model_validate(settings)
    with pytest.raises(ConfigError, match=sentence):
        create_optimizer(model, model, optim, 0.1)


def test_a_loss_that_nothing_trained_changes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    frozen = {"transfer": {"layers": "0", "task_weight": 0.0}, "optim": {"trainable": r"blocks\.1"}}
    run = config(tmp_path / "run", make_teacher(tmp_path / "teacher"), **frozen)
    for call in (partial(dry_run, run, 1, here=True), partial(train, run)):
        with pytest.raises(ConfigError, match="no trained parameter changes the loss"):
            call()
