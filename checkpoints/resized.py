"""Another image size for a converted model, whose operators have shapes of their own making: load, then resize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..models.attention.base import AttentionOperator
from ..models.conversion import ARCHITECTURE, converted_layers, resize
from ..models.families import token_layout
from .position import Method, resample_position
from .prefix_tokens import num_prefix_rows
from .report import LoadReport
from .weights import Weights, as_pair


def late_size(
    weights: Weights, asked: Mapping[str, Any], img_size: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    """The image size to take on after loading: of a converted model of a known size, if one is asked for."""
    wanted = img_size if img_size is not None else asked.get("img_size")
    known = weights.architecture == ARCHITECTURE and weights.img_size is not None
    return as_pair(wanted) if known and wanted is not None else None


def resize_loaded(model: nn.Module, size: tuple[int, int], method: Method, report: LoadReport) -> LoadReport:
    """Resizes a loaded model in place, position embeddings by `method`; the report with what was resampled.

    Raises UnsupportedModelError: the model has no such size.
    """
    positions = getattr(model, "pos_embed", None)
    positions = None if positions is None else positions.detach().clone()
    old = token_layout(model).grid
    resize(model, size)
    new = token_layout(model).grid
    if old == new:
        return report
    change = f"from grid {old[0]}x{old[1]} to {new[0]}x{new[1]}"
    done = {
        f"blocks.{index}.attn.operator": change
        for index, layer in converted_layers(model).items()
        if cast(AttentionOperator, layer.operator).traits.resolution == "resampled"
    }
    if positions is not None:
        with torch.no_grad():
            cast(Any, model).pos_embed.copy_(
                resample_position(positions, old, new, num_prefix_rows(model), method)
            )
        done["pos_embed"] = f"{change} ({method}'s bicubic)"
    return replace(report, resampled={**report.resampled, **done})
