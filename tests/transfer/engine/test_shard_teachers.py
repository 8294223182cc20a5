"""Teachers sharded over two gloo processes give the results of whole ones bit for bit, and hold half of the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.launch.plan_text import memory_items
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine.build import check_settings
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.parallel import check_placement
from graftvit.transfer.engine.shard_teachers import shard_units
from support.models.dense import tiny
from support.runs.engine_runs import config, make_convnext, make_teacher
from support.runs.scenarios import RunScenario

NEEDS_FSDP = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch cannot shard on a CPU"
)


@NEEDS_FSDP
@pytest.mark.slow
def test_a_step_of_every_family_is_that_of_the_whole_teacher(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("teacher_shards", "steps", tmp_path)
    assert report["codes"] == [0, 0], report["stderr"]
    assert all(found["equal"] for found in report["found"]), report
    assert all(found["share"] < 0.6 for found in report["found"]), report


@NEEDS_FSDP
@pytest.mark.slow
def test_a_run_is_that_of_whole_teachers(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("teacher_shards", "runs", tmp_path)
    assert report["codes"] == [[0, 0]] * 3, report["stderr"]
    assert report["differences"] == [[]]


def test_the_parts_that_are_gathered_one_by_one() -> None:
    vit = tiny()
    assert shard_units(vit) == list(vit.blocks)
    convnext = timm.create_model("test_convnext")
    units = shard_units(convnext)
    held = {id(parameter) for unit in units for parameter in unit.parameters()}
    assert len(held) == sum(len(list(unit.parameters())) for unit in units)  # none twice
    assert all(
        id(p) in held for stage in convnext.stages for block in stage.blocks for p in block.parameters()
    )


@pytest.mark.parametrize(
    ("sections", "processes", "message"),
    [
        ({}, 1, "teacher.shard=true shards over processes and this run has one"),
        ({"transfer": {"method": "copy"}}, 2, "does not go with transfer.method=copy"),
        ({"student": {"compile": True}}, 2, "student.compile=true cannot be used with teacher.shard=true"),
        ({"teacher": {"compile": True}}, 2, "teacher.compile=true cannot be used with teacher.shard=true"),
        (
            {"transfer": {"share_drop_path": True}},
            2,
            "share_drop_path=true cannot be used with teacher.shard",
        ),
        ({"transfer": {"cache": "targets"}}, 2, "transfer.cache cannot be used with teacher.shard=true"),
    ],
)
def test_what_does_not_go_with_a_sharded_teacher(
    sections: dict[str, Any], processes: int, message: str, tmp_path: Path
) -> None:
    teacher = {"source": "test_vit", "shard": True, **sections.pop("teacher", {})}
    run = config(tmp_path, **{"mode": "transfer", **sections}, teacher=teacher)
    with pytest.raises(ConfigError, match=message):
        check_placement(run, processes, on_cpu=True)


@pytest.mark.parametrize("mode", ["finetune", "align"])
def test_other_modes_refuse_a_sharded_teacher(mode: str, tmp_path: Path) -> None:
    run = config(
        tmp_path, mode=mode, teacher={"source": "test_vit", "shard": True}, student={"plan": "*: linear"}
    )
    with pytest.raises(
        ConfigError, match=f"teacher.shard=True changes nothing with mode={mode}, which neither"
    ):
        check_settings(mode_of(run))


@NEEDS_FSDP
def test_the_dry_run_counts_shards_and_one_whole_block(tmp_path: Path) -> None:
    vit, convnext = make_teacher(tmp_path / "vit"), make_convnext(tmp_path / "convnext")
    sizes = {}
    for shard in (False, True):
        run = config(
            tmp_path / "run",
            mode="transfer",
            teacher={"source": str(vit), "shard": shard},
            teachers={"c": {"source": str(convnext), "img_size": 32}},
            transfer={"losses": [{"method": "distill"}, {"method": "feature", "teacher": "c"}]},
        )
        built = dry_run(run, 4, here=False)
        (item,) = [item for item in memory_items(built) if item.name == "teacher"]
        sizes[shard] = item.size
        assert ("the blocks of teacher over 4 processes and one of them whole" in item.how) is shard
    block = sum(p.numel() * 4 for p in built.parts.teachers["teacher"].model.blocks[0].parameters())
    assert sizes[False] - sizes[True] == 2 * block - (2 * block // 4 + block)
