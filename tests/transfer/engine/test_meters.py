"""Running means of the losses."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from graftvit.transfer.engine.runlog import Meters, stacked


def test_means_and_a_cut_in_the_middle() -> None:
    accelerator, device = Accelerator(cpu=True), torch.device("cpu")
    values = [torch.rand(2) for _ in range(7)]
    whole = Meters(device)
    for value in values:
        whole.add(("loss", "task"), value)
    first = Meters(device)
    for value in values[:3]:
        first.add(("loss", "task"), value)
    second = Meters(device)
    second.load(first.count, first.names, first.sums.clone())
    for value in values[3:]:
        second.add(("loss", "task"), value)
    assert second.means(accelerator) == whole.means(accelerator)
    expected = torch.stack(values).double().mean(0).tolist()
    torch.testing.assert_close(list(whole.means(accelerator).values()), expected, rtol=1e-14, atol=0)


def test_reset_and_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    meters = Meters(torch.device("cpu"))
    assert meters.means(accelerator) == {}
    meters.add(("loss",), torch.ones(1))
    meters.reset()
    assert meters.means(accelerator) == {}


def test_stacked_detaches_and_keeps_the_order() -> None:
    loss = torch.ones((), requires_grad=True, dtype=torch.bfloat16)
    values = stacked({"loss": loss * 2, "task": loss * 3})
    assert values.tolist() == [2, 3]
    assert not values.requires_grad
    assert values.dtype == torch.float32
