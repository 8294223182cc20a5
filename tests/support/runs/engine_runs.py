"""Small runs on digits for the tests of the engine, and what two runs must have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from graftvit.checkpoints.files import read_records
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.state import find_state
from graftvit.checkpoints.student import write_student
from graftvit.checkpoints.weight_files import read_file
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.runlog import WALL_CLOCK
from graftvit.transfer.engine.train import train
from graftvit.transfer.setting import find_unread, without
from torch import Tensor, nn

ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny_vit(**overrides: Any) -> nn.Module:
    model: nn.Module = timm.create_model(ARCHITECTURE, **{**ARGUMENTS, "num_classes": 10, **overrides})
    return model


def make_teacher(folder: Path, classes: int = 10, **described: Any) -> Path:
    """A plain timm folder with random weights whose attention is far from uniform."""
    torch.manual_seed(11)
    model = tiny_vit(num_classes=classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(20)
    arguments = {**ARGUMENTS, "num_classes": classes}
    write_student(
        model,
        folder,
        architecture=ARCHITECTURE,
        model_args=arguments,
        preprocessing=Preprocessing.of(model, **{"mean": (0.5,), "std": (0.5,), **described}),
    )
    return folder


def make_convnext(folder: Path) -> Path:
    """A plain timm folder with a small ConvNeXt for digits."""
    torch.manual_seed(12)
    arguments = {"num_classes": 10, "in_chans": 1}
    model: nn.Module = timm.create_model("test_convnext", **arguments)
    spec = Preprocessing.of(model, mean=(0.4,), std=(0.3,))
    write_student(model, folder, architecture="test_convnext", model_args=arguments, preprocessing=spec)
    return folder


def several_losses(convnext: Path) -> dict[str, Any]:
    """Sections of a run with three losses of two teachers, one of them a ConvNeXt that sees larger images."""
    return {
        "teachers": {"convnext": {"source": f"local-dir:{convnext}", "img_size": 32}},
        "transfer": {
            "losses": [
                {"method": "distill", "weight": 3.0, "layers": "0"},
                {"method": "feature", "weight": 0.5, "teacher": "convnext"},
                {"method": "logits", "weight": 0.5, "temperature": 2.0, "teacher": "convnext"},
            ]
        },
    }


def config(output_dir: Path, source: Path | None = None, **sections: Any) -> RunConfig:
    """Two epochs of eight steps; `sections` overrides keys, as in `optim={"blr": 1.0}`, and what these leave unread."""
    base: dict[str, Any] = {
        "mode": "scratch" if source is None else "transfer",
        "output_dir": output_dir,
        "teacher": {"source": None if source is None else f"local-dir:{source}"},
        "student": {"model": ARCHITECTURE, "model_args": ARGUMENTS, "drop_path": 0.2},
        "data": {
            "dataset": "digits", "batch_size": 16, "eval_batch_size": 256, "workers": 0,
            "train_samples": 130, "aa": None, "hflip": 0.0, "crop_scale": (0.8, 1.0), "mixup": 0.2,
        },
        "optim": {"epochs": 2, "blr": 0.03, "warmup_epochs": 0.5, "ema": 0.9, "clip_grad": 1.0},
        "engine": {"device": "cpu", "log_interval": 3, "trackers": (), "progress": False, "report": False},
        "pretrain": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2},
    }  # fmt: skip
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    found = RunConfig.model_validate(base)
    given = {
        f"{name}.{key}" if isinstance(values, dict) else name
        for name, values in sections.items()
        for key in (values if isinstance(values, dict) else [""])
    }
    return without(found, find_unread(found).keys() - given)


def resume_cut(
    make: Callable[[Path], RunConfig], root: Path, before: Callable[[], object] = lambda: None
) -> Path:
    """Train a run whole, and another one whose last state is lost, which resumes from the state before.

    Returns the folder of the whole run. `before` is called before the other one resumes.

    Raises:
        AssertionError: they are not equal, bit for bit.
    """
    whole, cut = (make(root / name) for name in ("whole", "cut"))
    train(whole), train(cut)
    (cut.output_dir / "checkpoints" / "last.safetensors").unlink()
    before()
    train(cut)
    assert differences(whole.output_dir, cut.output_dir) == []
    return whole.output_dir


def state(folder: Path, name: str = "last") -> dict[str, Tensor]:
    """The whole tensors of a state of a run, sharded or not."""
    return read_file(find_state(folder / "checkpoints", name)).tree


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in record.items() if k not in WALL_CLOCK}
        for record in read_records(folder / "log.jsonl")
    ]


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common, bit for bit: weights, average, optimizer, generators, log."""
    found = [] if records(one) == records(other) else ["log"]
    for name in ("last", "best"):
        first, second = state(one, name), state(other, name)
        found += sorted(f"{name}: {key}" for key in first.keys() ^ second.keys())
        found += [
            f"{name}: {key}"
            for key in first.keys() & second.keys()
            if not torch.equal(first[key], second[key])
        ]
    for file in ("student/model.safetensors", "student_ema/model.safetensors"):
        first, second = ((run / file).read_bytes() if (run / file).exists() else b"" for run in (one, other))
        found += [file] if first != second else []
    return found
