"""Tiny pyramids of timm, one of each kind, whose biases are not zero, so that padding shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftvit.models.cswin_models
import graftvit.models.pvt_models  # noqa: F401  registers PVT with timm
import timm
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.student import write_student
from torch import Tensor, nn

_PVT: dict[str, Any] = {
    "embed_dims": (8, 16), "depths": (1, 2), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2),
}  # fmt: skip
_TWINS: dict[str, Any] = {**_PVT, "depths": (2, 2), "sr_ratios": (2, 1)}
_SWIN: dict[str, Any] = {
    "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 3, "mlp_ratio": 2.0,
}  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "pvt": ("pvt_v2_b0", _PVT), "pvt_li": ("pvt_v2_b2_li", _PVT), "pvt1": ("pvt_small", _PVT),
    "svt": ("twins_svt_small", {**_TWINS, "wss": (3, 3)}), "pcpvt": ("twins_pcpvt_small", _TWINS),
    "cswin": ("cswin_tiny", {
        "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "split_size": (2, 2), "mlp_ratio": 2.0,
    }),
    "swin": ("swin_tiny_patch4_window7_224", _SWIN), "swinv2": ("swinv2_tiny_window8_256", _SWIN),
}  # fmt: skip
ANY_SIZE = ("pvt", "pvt_li")
SIZES = {"square": (32, 32), "not divisible": (40, 24)}


def arguments(kind: str, size: tuple[int, int] = (32, 32), **more: Any) -> dict[str, Any]:
    """Return the arguments of timm's constructor; PVTv2 takes no image size."""
    sized = {} if kind in ANY_SIZE else {"img_size": size}
    return {**TINY[kind][1], "num_classes": 3, **sized, **more}


def tiny(kind: str, size: tuple[int, int] = (32, 32), *, seed: int = 0, **more: Any) -> nn.Module:
    """Return a tiny model with random weights everywhere, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(TINY[kind][0], **arguments(kind, size, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if kind in ANY_SIZE:
        model.img_size = size
    return model.eval()


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def write_pyramid(folder: Path, kind: str) -> Path:
    """Write a tiny pyramid of ten classes with random weights as a folder of timm."""
    model = tiny(kind, num_classes=10)
    shown = Preprocessing.of(model, input_size=(3, 32, 32))
    how = {"architecture": TINY[kind][0], "model_args": arguments(kind, num_classes=10)}
    write_student(model, folder, **how, preprocessing=shown)
    return folder
