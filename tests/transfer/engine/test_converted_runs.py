"""Runs of converted students: aligned, then trained by output matching, resumed, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.json_lines import read_records
from graftvit.models.conversion import convert, new_parameters, plan_of
from graftvit.models.errors import ConfigError, TransferError
from graftvit.transfer.config import OptimConfig
from graftvit.transfer.engine.optim import create_optimizer
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, state

PLAN = "*: linear; 1: softmax"


def align(output_dir: Path, teacher: Path, **sections: Any) -> Any:
    student = {"model": f"local-dir:{teacher}", "plan": PLAN, "model_args": {}, "drop_path": 0.0}
    return config(output_dir, teacher, **{"mode": "align", "student": student, **sections})


def test_alignment_then_output_matching(teacher: Path, tmp_path: Path) -> None:
    result = train(align(tmp_path / "a", teacher))
    assert result.finished
    losses = [
        record["train_layer00"]
        for record in read_records(tmp_path / "a" / "log.jsonl")
        if "test_top1" in record
    ]
    assert losses[-1] < losses[0]
    aligned = graftvit.load(str(tmp_path / "a" / "student"))
    original = graftvit.load(str(teacher))
    assert plan_of(aligned) == "0: linear; 1: softmax"
    changed = {
        name
        for name, tensor in aligned.named_parameters()
        if not torch.equal(tensor, original.get_parameter(name))
    }
    assert changed == {"blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"}

    student = {"model": f"local-dir:{tmp_path / 'a' / 'student'}", "model_args": {}, "drop_path": 0.0}
    transfer = {"method": "attention_output", "weight": 50.0, "reduction": "mean"}
    again = config(tmp_path / "c", teacher, student=student, transfer=transfer)
    assert train(again).finished
    assert plan_of(graftvit.load(str(tmp_path / "c" / "student_ema"))) == plan_of(aligned)
    assert "train_layer00" in read_records(tmp_path / "c" / "log.jsonl")[-1]


def test_an_alignment_goes_on_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    """Probes are drawn anew in every step, so the generators are put back too."""
    how = {"align": {"match": "probes"}, "engine": {"save_every": 5}}
    train(align(tmp_path / "whole", teacher, **how))
    train(align(tmp_path / "cut", teacher, **how))
    (tmp_path / "cut" / "checkpoints" / "last.safetensors").unlink()
    train(align(tmp_path / "cut", teacher, **how))
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_a_converted_student_from_scratch(tmp_path: Path) -> None:
    student = {"model": ARCHITECTURE, "model_args": ARGUMENTS, "plan": PLAN}
    assert train(config(tmp_path, student=student)).finished
    assert plan_of(graftvit.load(str(tmp_path / "student"))) == "0: linear; 1: softmax"


def test_what_is_missing_is_said(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mode=align needs a teacher"):
        train(config(tmp_path, None, mode="align"))
    with pytest.raises(TransferError, match="no layer of the student is converted"):
        train(align(tmp_path, teacher, student={"plan": None}))


def test_new_parameters_learn_faster() -> None:
    model = convert(timm.create_model(ARCHITECTURE, **ARGUMENTS), "*: hedgehog; 1: window(window=1)")
    optimizer = create_optimizer(model, model, OptimConfig(scales={r"\.operator\.": 20.0}), 1e-3)
    scales = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    new = {id(parameter) for parameter in new_parameters(model)}
    assert new
    assert all(scale == (20.0 if key in new else 1.0) for key, scale in scales.items())


def test_factors_of_several_expressions_multiply(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model(ARCHITECTURE, **ARGUMENTS)
    scales = {r"blocks\.0": 0.5, r"mlp\.fc1\.weight": 4.0, "nowhere": 3.0}
    optimizer = create_optimizer(model, model, OptimConfig(scales=scales, layer_decay=0.5), 1e-3)
    plain = create_optimizer(model, model, OptimConfig(layer_decay=0.5), 1e-3)
    found, without = (
        {id(p): group["lr_scale"] for group in each.param_groups for p in group["params"]}
        for each in (optimizer, plain)
    )
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name, factor in (
        ("blocks.0.mlp.fc1.weight", 2.0), ("blocks.0.mlp.fc1.bias", 0.5), ("blocks.1.mlp.fc1.weight", 4.0),
        ("head.bias", 1.0),
    ):  # fmt: skip
        assert found[names[name]] == factor * without[names[name]]
    assert found.keys() == without.keys()
    assert "optim.scales: 'nowhere' matches the name of no parameter that learns" in caplog.text
    with pytest.raises(ConfigError, match=r"optim.scales='\(' is not a regular expression"):
        create_optimizer(model, model, OptimConfig(scales={"(": 2.0}), 1e-3)
