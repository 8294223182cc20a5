"""Whole and sharded tensors and teachers, and errors that all processes raise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
from graftvit.launch.plan_text import memory_items
from graftvit.models.conversion import convert
from graftvit.models.errors import ConfigError, RunFailedError
from graftvit.transfer.engine.build import check_settings
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.parallel import (
    check_layers_apart,
    check_placement,
    create_accelerator,
    gather,
    gathered,
    looks_for_unused,
    mesh_of_nodes,
    placed_like,
    raise_together,
    whole,
)
from graftvit.transfer.engine.shard_teachers import shard_units
from graftvit.transfer.methods.dual import DualViT
from support.models import dense
from support.models.dense import tiny
from support.runs.engine_runs import config, make_convnext, make_teacher
from support.runs.scenarios import NEEDS_FSDP, RunScenario


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
        assert accelerator.scaler is None, "gradients are scaled for fp16 only"
        with accelerator.autocast():
            dual = DualViT(dense.tiny(seed=1).float(), dense.tiny(seed=2).float(), "distill")
            output = dual(dense.images(dtype=torch.float32))
        assert output.logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert output.transfer_loss.dtype == torch.float32


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
    with pytest.raises(ConfigError, match=r"student.compile=true cannot be used with engine.fsdp"):
        create_accelerator(config(Path("runs"), engine={"fsdp": True}, student={"compile": True}))


def test_layers_that_learn_alone_do_not_go_with_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftvit.transfer.engine.parallel.Accelerator.num_processes", 2)
    with pytest.raises(ConfigError, match=r"mode=align .* set engine.fsdp=false"):
        create_accelerator(config(Path("runs"), mode="align", engine={"fsdp": True}))


def test_layers_that_share_parameters_are_not_sharded_one_by_one() -> None:
    student = convert(dense.tiny(dtype=torch.float32), "*: linformer(sharing=layerwise)")
    with pytest.raises(ConfigError, match=r"sharing=layerwise .* set engine.fsdp=false"):
        check_layers_apart(student)


@NEEDS_FSDP
@pytest.mark.slow
def test_a_step_of_every_family_is_that_of_a_whole_teacher(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("teacher_shards", "steps", tmp_path)
    assert report["codes"] == [0, 0], report["stderr"]
    assert all(found["equal"] for found in report["found"][0]), report
    assert all(found["share"] < 0.6 for found in report["found"][0]), report


@NEEDS_FSDP
@pytest.mark.slow
def test_each_process_reads_its_rows_of_a_teacher_and_never_holds_more(
    run_scenario: RunScenario, tmp_path: Path
) -> None:
    report = run_scenario("teacher_shards", "loads", tmp_path)
    assert report["codes"] == [0] * 4, report["stderr"]
    for found in report["found"]:
        for kind, own in found.items():
            assert own["equal"], kind
            assert own["read"] == own["tensors"], kind
            assert own["peak"] <= 1.1 * own["weights"] / 4 + own["largest"], (kind, own)


@NEEDS_FSDP
@pytest.mark.slow
def test_a_run_is_that_of_whole_teachers(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("teacher_shards", "runs", tmp_path)
    assert report["codes"] == [[0, 0]] * 3, report["stderr"]
    assert report["differences"] == [[]]


@NEEDS_FSDP
@pytest.mark.slow
def test_shards_are_gathered_within_a_node(run_scenario: RunScenario, tmp_path: Path) -> None:
    report = run_scenario("teacher_shards", "nodes", tmp_path)
    assert report["codes"] == [0] * 5, report["stderr"]
    assert report["gap"] < 1e-5
    for rank, groups in enumerate(report["groups"]):
        node, across = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        gathers, scatters = groups["gather"], groups["scatter"]
        assert gathers == [node] * len(gathers)
        assert scatters == [node] * len(scatters)
        assert len(scatters) == groups["reduce"].count(across) > 0  # gradients alone leave the node
        assert len(gathers) > 2 * len(scatters)  # of the teacher too


def test_nodes_of_unlike_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = cast(Any, SimpleNamespace(process_index=1, num_processes=3, device=torch.device("cpu")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start as many on each"):
        mesh_of_nodes(accelerator, None, "cpu")


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
        (
            {
                "transfer": {"method": "logits", "cache": "targets"},
                "data": {"views": 1, "mixup": 0, "cutmix": 0},
            },
            2,
            "transfer.cache cannot be used with teacher.shard=true",
        ),
        *(
            ({"mode": m}, 1, f"shard=true changes nothing with mode={m}, which neither")
            for m in ("finetune", "align")
        ),
    ],
)
def test_what_does_not_go_with_a_sharded_teacher(
    sections: dict[str, Any], processes: int, message: str, tmp_path: Path
) -> None:
    teacher = {"source": "test_vit", "shard": True, **sections.get("teacher", {})}
    plan = {"plan": "*: linear"} if sections.get("mode") == "align" else {}
    student = plan | sections.get("student", {})
    run = config(tmp_path, **{"mode": "transfer", **sections, "teacher": teacher, "student": student})

    def check() -> None:
        check_settings(mode_of(run))
        check_placement(run, processes, on_cpu=True)

    with pytest.raises(ConfigError, match=message):
        check()


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
