"""The folder of a tiny student, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student

NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def write_tiny_student(folder: Path, **how: Any) -> Path:
    """Write a student's folder; `how` is what `write_student` takes beside the architecture."""
    model = timm.create_model(NAME, **ARGUMENTS)
    how = {"architecture": NAME, "model_args": ARGUMENTS, "preprocessing": Preprocessing.of(model)} | how
    write_student(model, folder, **how)
    return folder
