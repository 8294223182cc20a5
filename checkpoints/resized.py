"""Another image size for a converted model, whose operators have shapes of their own making, and for one that copies
its teacher's attention: load, then resize."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..models import attnzero, lit, pvt_models
from ..models.conversion import ARCHITECTURE as CONVERTED
from ..models.conversion import converted_layers
from ..models.copied import ARCHITECTURE as COPIED
from ..models.copied import copying_of, resize
from ..models.errors import Json
from ..models.families import Site, sites, vit
from .position import Method, resample_position
from .prefix_tokens import num_prefix_rows
from .report import LoadReport
from .weights import Weights, as_pair


def late_size(
    weights: Weights, asked: Json, img_size: int | tuple[int, int] | None, model: str | None = None
) -> tuple[int, int] | None:
    """Return the image size to apply after loading: for a converted or copying model of known size, if requested.

    `model` is the architecture of weights that do not say theirs.
    """
    wanted = img_size if img_size is not None else asked.get("img_size")
    ours = (
        CONVERTED,
        COPIED,
        *attnzero.default_cfgs,
        *lit.default_cfgs,
        *pvt_models.default_cfgs,
    )  # with parts for one size in each stage
    known = (weights.architecture or model) in ours and weights.img_size is not None
    return as_pair(wanted) if known and wanted is not None else None


def resize_loaded(model: nn.Module, size: tuple[int, int], method: Method, report: LoadReport) -> LoadReport:
    """Resize a loaded model in place, position embeddings by `method`; return the report with what was resampled.

    Raises UnsupportedModelError: the model has no such size.
    """
    parts = {"": model} if copying_of(model) is None else {"": model, "teacher.": vit(model).teacher.model}
    positions = {prefix: getattr(part, "pos_embed", None) for prefix, part in parts.items()}
    before = sites(model)
    resize(model, size)
    after, layers = sites(model), converted_layers(model)
    changes = {site.index: _change(site, now) for site, now in zip(before, after, strict=True)}
    if not any(changes.values()):
        return report
    done = {
        f"{site.path}.attn.operator": changes[site.index]
        for site in after
        if site.index in layers and layers[site.index].operator.traits.resolution == "resampled"
    }
    old, new, change = before[0].shape.geometry.grid, after[0].shape.geometry.grid, changes[0]
    for prefix, position in positions.items():
        if position is None:
            continue
        part = vit(parts[prefix])
        with torch.no_grad():
            part.get_parameter("pos_embed").copy_(
                resample_position(position, old, new, num_prefix_rows(part), method)
            )
        done[f"{prefix}pos_embed"] = f"{change} ({method}'s bicubic)"
    return replace(report, resampled={**report.resampled, **done})


def _change(old: Site, new: Site) -> str:
    """Return how the grid of a block changed, in words; nothing if it did not."""
    (rows, columns), (height, width) = old.shape.geometry.grid, new.shape.geometry.grid
    return "" if (rows, columns) == (height, width) else f"from grid {rows}x{columns} to {height}x{width}"
