"""Whole and sharded tensors, and errors that all processes raise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from graftvit.models.conversion import convert
from graftvit.models.errors import ConfigError, RunFailedError
from graftvit.transfer.engine.parallel import (
    check_layers_apart,
    create_accelerator,
    gather,
    gathered,
    looks_for_unused,
    placed_like,
    raise_together,
    whole,
)
from support.models import dense
from support.runs.engine_runs import config


def test_whole_is_a_copy_that_training_does_not_change() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    copy = whole(weight)
    with torch.no_grad():
        weight.add_(1)
    assert copy.tolist() == [1, 1, 1]
    assert not copy.requires_grad


def test_placed_like_takes_type_and_values() -> None:
    placed = placed_like(torch.tensor([1.5, 2.5], dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16))
    assert placed.dtype == torch.bfloat16
    assert placed.tolist() == [1.5, 2.5]


def test_only_the_writing_process_keeps_what_is_gathered() -> None:
    tensors = {"a": torch.ones(2)}
    assert gathered(tensors, keep=False) == {}
    assert gathered(tensors, keep=True)["a"].tolist() == [1, 1]


def test_one_process_agrees_with_itself() -> None:
    assert gather(3, None) == [3]
    raise_together(None, None)
    with pytest.raises(RunFailedError, match="full"):
        raise_together(RunFailedError("full"), None)


def test_precision_may_change_from_run_to_run_in_one_process() -> None:
    for precision in ("fp32", "bf16", "fp32"):
        accelerator = create_accelerator(config(Path("runs"), engine={"precision": precision}))
        assert accelerator.mixed_precision == ("no" if precision == "fp32" else precision)


@pytest.mark.parametrize(
    ("method", "world_size", "cpu", "looks"),
    [
        ("distill", 1, True, False),
        ("distill", 2, True, False),  # a + b is b + a
        ("distill", 3, True, True),
        ("distill", 3, False, False),
        ("copy", 2, False, True),
    ],
)
def test_unused_parameters_are_looked_for_where_they_have_to_be(
    method: str, world_size: int, cpu: bool, looks: bool
) -> None:
    made = config(Path("runs"), mode="transfer", transfer={"method": method})
    assert looks_for_unused(made, world_size, cpu=cpu) is looks


def test_compilation_does_not_go_with_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.transfer.engine.parallel.Accelerator.num_processes", 2)
    with pytest.raises(ConfigError, match=r"student.compile=true cannot be used with engine.fsdp=true"):
        create_accelerator(config(Path("runs"), engine={"fsdp": True}, student={"compile": True}))


def test_layers_that_share_parameters_are_not_sharded_one_by_one() -> None:
    student = convert(dense.tiny(dtype=torch.float32), "*: linformer(sharing=layerwise)")
    with pytest.raises(ConfigError, match=r"sharing=layerwise .* set engine.fsdp=false"):
        check_layers_apart(student)
