"""Loading a source's file and holding its features against the reference, for the tests of formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.provenance import Pretrained
from support.files.source_files import DEPTH, HEADS, Tensors
from support.models import reference_vit as reference
from torch import Tensor

TINY: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
IMAGENET = (0.485, 0.456, 0.406)
HALF = (0.5, 0.5, 0.5)
Load = Callable[..., Pretrained]


def loader(folder: Path) -> Load:
    """What saves a tree in `folder` and loads a part of it as a tiny teacher."""

    def load(tree: Any, model: str, part: str = "", **arguments: Any) -> Pretrained:
        torch.save(tree, folder / "source.pth")
        return load_pretrained(
            f"{folder / 'source.pth'}{part}", model=model, model_args={**TINY, **arguments}
        )

    return load


def doubled(tensors: Tensors) -> Tensors:
    return {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}


def agree(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).norm() / theirs.norm()) < 1e-5


def same_features(teacher: Pretrained, expected: Callable[[Tensor], Tensor], *, logits: bool = False) -> bool:
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        ours: Tensor = teacher.model(images) if logits else teacher.model.forward_features(images)  # type: ignore[operator]
    return agree(ours.double(), expected(images.double()))


def plain(tensors: Tensors) -> Callable[[Tensor], Tensor]:
    """All tokens after the final norm."""
    t = doubled(tensors)
    return lambda images: reference.norm(reference.plain_vit(t, images, HEADS, DEPTH), t, "norm")
