"""A teacher with weights of half the size, and one that is compiled: how far the numbers are from the plain ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from graftvit.launch.plan_text import memory_items
from graftvit.models.errors import ConfigError
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from graftvit.transfer.methods.dual import DualViT
from support.models.dense import gradient, images, relative_error, tiny
from support.runs.engine_runs import config, make_teacher, records

WITH_LOSS = [
    "distill", "distill_q", "distill_k", "distill_v", "attention_output", "block_output", "feature", "logits",
]  # fmt: skip


def calm(seed: int) -> Any:
    """A small model in float32 with ordinary weights, whose results bfloat16 gives to two digits."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(32, 48),
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=5,
    )
    return model.eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", WITH_LOSS)
def test_a_half_teacher_gives_nearly_the_same_loss_and_gradient(
    method: str, dtype: torch.dtype, autocast: bool
) -> None:
    teacher, student, x = calm(1), calm(2), images(dtype=torch.float32)
    results = []
    for kind in (torch.float32, dtype):
        model = copy.deepcopy(student)
        dual = DualViT(copy.deepcopy(teacher).to(kind), model, method)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = dual(x).transfer_loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert {p.dtype for p in dual.teacher.parameters()} == {kind}
        results.append((loss.detach(), gradient(model)))
    assert relative_error(results[1][0], results[0][0]) < 0.05
    assert relative_error(results[1][1], results[0][1]) < 0.25


@pytest.mark.parametrize("method", ["distill", "feature"])
def test_a_compiled_teacher_gives_the_same(method: str) -> None:
    torch.compiler.reset()
    teacher, student, x = tiny(seed=1).float(), tiny(seed=2).float(), images(dtype=torch.float32)
    expected = DualViT(teacher, copy.deepcopy(student), method)(x).transfer_loss
    dual = DualViT(teacher, student, method)
    counter = torch._dynamo.testing.CompileCounter()
    monkeyed = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: monkeyed(self, backend=counter, **options)  # type: ignore[method-assign]
    try:
        dual.compile_teachers(["teacher"])
    finally:
        torch.nn.Module.compile = monkeyed  # type: ignore[method-assign]
    out = dual(x).transfer_loss
    assert counter.frame_count == 1
    assert relative_error(out, expected) < 1e-6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def test_a_run_with_a_half_teacher(teacher: Path, tmp_path: Path) -> None:
    source = {"source": f"local-dir:{teacher}"}
    sizes, losses = {}, {}
    for kind in ("fp32", "bf16"):
        run = config(
            tmp_path / kind, optim={"max_steps": 2}, mode="transfer", teacher={**source, "dtype": kind}
        )
        items = {item.name: item for item in memory_items(dry_run(run, 1, here=True))}
        sizes[kind] = items["teacher"].size
        assert {"fp32": "float32", "bf16": "bfloat16"}[kind] in items["teacher"].how
        assert train(run).finished
        losses[kind] = next(r["train_transfer"] for r in records(tmp_path / kind) if "train_transfer" in r)
    assert sizes["bf16"] * 2 == sizes["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"teacher": {"dtype": "bf16"}, "transfer": {"method": "copy"}},
            "teacher.dtype=bf16 does not go with .*copy",
        ),
        (
            {"teacher": {"compile": True}, "student": {"compile": True}},
            "teacher.compile=true changes nothing",
        ),
        ({"engine": {"tf32": True}}, "engine.tf32=true needs a GPU"),
    ],
)
def test_types_that_a_run_cannot_have_are_refused(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    source = {"source": f"local-dir:{teacher}", **sections.pop("teacher", {})}
    run = config(tmp_path / "run", mode="transfer", teacher=source, **sections)
    for start in (lambda: dry_run(run, 1, here=True), lambda: train(run)):
        with pytest.raises(ConfigError, match=message):
            start()
