"""Runs with programs as attention: fresh, from a teacher, aligned; on plain models and pyramids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit
import pytest
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from graftvit.models.conversion import converted_layers, plan_of
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.train import train
from support.models.pyramids import TINY, arguments, images, tiny
from support.runs.engine_runs import config
from torch import nn

CODE = "mul(mm(elu1(q) tn(elu1(k) v)) recip(nt(elu1(q) sum(elu1(k)))))"
PLAN = f"*: program(code={CODE}); 0: attnzero_105"


def run(output_dir: Path, kind: str, mode: str, student: dict[str, Any], **sections: Any) -> RunConfig:
    name, model_args = TINY[kind]
    model = {"model": name, "model_args": model_args, "img_size": 32, "plan": PLAN, "without": ["bias"]}
    short = {"optim": {"max_steps": 3, "warmup_epochs": 0}, "data": {"batch_size": 8, "train_samples": 24}}
    return config(output_dir, mode=mode, student={**model, **student}, **{**short, **sections})


def convolutions(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.named_parameters() if ".operator.conv." in name]


def loaded_as_trained(folder: Path) -> nn.Module:
    """The saved student, which timm alone builds too; its plan is the run's."""
    loaded = graftvit.load(folder).eval()
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images((32, 32))), loaded(images((32, 32))))
    choices = [layer.choice for layer in converted_layers(loaded).values()]
    assert str(plan_of(loaded)).startswith("0: attnzero_105; ")
    assert choices[1].options == {"code": CODE}
    return loaded


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_a_fresh_pyramid_trains_with_convolutions_that_are_not_zero(kind: str, tmp_path: Path) -> None:
    settings = run(tmp_path / "run", kind, "scratch", {})
    assert all(tensor.any() for tensor in convolutions(build(settings).task.trainable))
    train(settings)
    loaded_as_trained(tmp_path / "run" / "student")


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_a_converted_pyramid_starts_without_its_convolutions_and_learns_them(
    kind: str, tmp_path: Path
) -> None:
    how = {"architecture": TINY[kind][0], "model_args": arguments(kind, num_classes=10)}
    teacher = tiny(kind, num_classes=10)
    shown = Preprocessing.of(teacher, input_size=(3, 32, 32))
    write_student(teacher, tmp_path / "teacher", **how, preprocessing=shown)
    settings = run(
        tmp_path / "run", kind, "finetune", {"init": "teacher"}, teacher={"source": str(tmp_path / "teacher")}
    )
    assert not any(tensor.any() for tensor in convolutions(build(settings).task.trainable))
    train(settings)
    assert all(tensor.any() for tensor in convolutions(loaded_as_trained(tmp_path / "run" / "student")))
