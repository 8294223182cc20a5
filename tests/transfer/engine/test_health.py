"""Which part of the loss stopped being finite, and when."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from graftvit.transfer.engine.runlog import LossHealth, describe, weights_finite
from torch import Tensor, nn

NAMES = ("loss", "task", "transfer", "layer00", "layer01")


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def losses(*bad: str, value: float = float("nan")) -> Tensor:
    return torch.tensor([value if name in bad else 1.0 for name in NAMES])


def test_finite_losses_fail_nothing(accelerator: Accelerator) -> None:
    health = LossHealth()
    assert health.failures(accelerator) == {}
    health.record(1, NAMES, losses())
    assert health.failures(accelerator) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_step_of_each_part_is_kept(accelerator: Accelerator, value: float) -> None:
    health = LossHealth()
    health.record(1, NAMES, losses())
    health.record(2, NAMES, losses("loss", "transfer", "layer01", value=value))
    health.record(3, NAMES, losses(*NAMES, value=value))
    health.record(4, NAMES, losses())
    failures = health.failures(accelerator)
    assert failures == {"loss": 2, "transfer": 2, "layer01": 2, "task": 3, "layer00": 3}
    assert describe(failures) == "the loss is not finite at step 2 (in layer01)"


def test_a_total_that_no_part_explains_is_named() -> None:
    assert describe({"loss": 5}) == "the loss is not finite at step 5 (in loss)"
    assert "in task" in describe({"loss": 5, "task": 5})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_weight_is_found(accelerator: Accelerator, value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert weights_finite(model, accelerator)
    with torch.no_grad():
        model[0].bias[1] = value
    assert not weights_finite(model, accelerator)
