"""The memory of a dry run; that it is what a step keeps, `test_plan_is_the_run.py` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.launch.plan_text import describe_memory, memory_items, parameter_count
from graftvit.transfer.engine.dry_run import DryRun, dry_run
from support.runs.engine_runs import config


def run(folder: Path, processes: int = 1, **sections: Any) -> DryRun:
    return dry_run(config(folder / "run", **sections), processes, here=False)


def sizes(folder: Path, processes: int = 1, **sections: Any) -> dict[str, int]:
    return {item.name: item.size for item in memory_items(run(folder, processes, **sections))}


def test_what_changes_the_estimate(tmp_path: Path) -> None:
    plain = sizes(tmp_path)
    count = parameter_count(run(tmp_path).parts.task)
    assert plain["student"] == plain["gradients"] == plain["moving average"] == 4 * count
    assert plain["optimizer"] == pytest.approx(8 * count, rel=0.01)
    assert sizes(tmp_path, data={"batch_size": 32})["activations"] == 2 * plain["activations"]
    assert sizes(tmp_path, engine={"precision": "bf16"})["activations"] < plain["activations"]
    assert "moving average" not in sizes(tmp_path, optim={"ema": None})
    deep = {
        "student": {
            "model_args": {
                "img_size": 8,
                "patch_size": 2,
                "in_chans": 1,
                "embed_dim": 16,
                "depth": 8,
                "num_heads": 2,
            }
        }
    }
    saving = {"student": {**deep["student"], "grad_checkpointing": True}}
    assert sizes(tmp_path, **saving)["activations"] < 0.5 * sizes(tmp_path, **deep)["activations"]


def test_fsdp_divides_what_it_shards(tmp_path: Path) -> None:
    plain, sharded = sizes(tmp_path, 4), sizes(tmp_path, 4, engine={"fsdp": True})
    assert sharded["optimizer"] == plain["optimizer"] // 4
    assert sharded["activations"] == plain["activations"]


def test_an_optimizer_of_another_machine_is_left_out(tmp_path: Path) -> None:
    assert "optimizer" not in sizes(tmp_path, optim={"opt": "fusedadamw"})


def test_the_table_sums_up(tmp_path: Path) -> None:
    lines = describe_memory(run(tmp_path))
    parts = [float(line.split("MiB")[0].split()[-1]) for line in lines[:-1]]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.3)
    assert "not counted" in lines[-1]
