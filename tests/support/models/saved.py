"""Folders of tiny models, as a run or `graftvit save` leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from support.models.pyramids import TINY, arguments, tiny
from torch import nn

NAME = "vit_tiny_patch16_224"


def save_model(
    folder: Path,
    model: nn.Module,
    name: str,
    model_args: Mapping[str, Any],
    license: str = "",
    **described: Any,
) -> str:
    """Write a timm folder whose images are described so; return it as a source."""
    how = {"architecture": name, "model_args": dict(model_args), "license": license or None}
    write_student(model, folder, preprocessing=Preprocessing.of(model, **described), **how)
    return f"local-dir:{folder}"


def save_vit(folder: Path, model_args: Mapping[str, Any], license: str = "", seed: int = 0) -> Path:
    """Write a plain vision transformer with random weights and a description that is no default."""
    torch.manual_seed(seed)
    channels = model_args.get("in_chans", 3)
    described = {"mean": (0.4,) * channels, "std": (0.2,) * channels}
    save_model(folder, timm.create_model(NAME, **model_args), NAME, model_args, license, **described)
    return folder


def save_pyramid(
    folder: Path, kind: str, model: nn.Module | None = None, size: tuple[int, int] = (32, 32), **changes: Any
) -> str:
    """Write a tiny pyramid, or what was made of it; return it as a source."""
    model = tiny(kind, size, **changes) if model is None else model
    return save_model(folder, model, TINY[kind][0], arguments(kind, size, **changes), input_size=(3, *size))
