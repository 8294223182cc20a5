"""Folders of small students, and models compared by their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from torch import Tensor, nn

NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
HALF = (0.5, 0.5, 0.5)


def write_tiny_student(folder: Path, **how: Any) -> Path:
    """Write a student's folder; `how` is what `write_student` takes beside the architecture."""
    model = timm.create_model(NAME, **ARGUMENTS)
    how = {"architecture": NAME, "model_args": ARGUMENTS, "preprocessing": Preprocessing.of(model)} | how
    write_student(model, folder, **how)
    return folder


def save_folder(
    model: nn.Module,
    folder: Path,
    name: str,
    arguments: Mapping[str, Any],
    shown: Mapping[str, Any] = {"mean": HALF, "std": HALF},
    **more: Any,
) -> str:
    """Write a model as a student; `shown` is what of its images is not timm's. Return its name as a source."""
    images = Preprocessing.of(model, **shown)
    write_student(model, folder, architecture=name, model_args=dict(arguments), preprocessing=images, **more)
    return str(folder)


def same_weights(one: nn.Module | Mapping[str, Tensor], other: nn.Module | Mapping[str, Tensor]) -> bool:
    """Return whether two models, or state dicts, have the same names and bits."""
    ours, theirs = (x.state_dict() if isinstance(x, nn.Module) else x for x in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
