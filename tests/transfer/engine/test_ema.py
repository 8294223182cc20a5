"""The moving average of the student."""

from __future__ import annotations

import torch
from graftvit.transfer.engine.ema import WeightAverage
from torch import nn


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_it_is_the_average_of_the_equation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = WeightAverage(model, decay=0.9)
    expected = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    for _ in range(5):
        moved(model)
        average.update()
        for name, tensor in expected.items():
            tensor.mul_(0.9).add_(model.state_dict()[name], alpha=0.1)
    assert average.updates == 5
    assert average.average.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(average.average[name], tensor, rtol=1e-12, atol=1e-14)


def test_it_starts_as_the_weights_and_shares_no_memory() -> None:
    model = nn.Linear(3, 4)
    average = WeightAverage(model, decay=0.5)
    before = model.weight.detach().clone()
    moved(model)
    assert torch.equal(average.average["weight"], before)


def test_applied_gives_the_weights_back_bit_for_bit() -> None:
    model = nn.Linear(3, 4)
    average = WeightAverage(model, decay=0.5)
    moved(model)
    own = model.weight.detach().clone()
    images = torch.randn(2, 3)
    with average.applied():
        assert torch.equal(model.weight, average.average["weight"])
        expected = model(images)
    assert torch.equal(model.weight, own)
    assert model.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(average.predictor(model)(images), expected)
        assert not torch.equal(model(images), expected)
